"""What is to be trained, as the user says it, and what to change where it does not fit."""

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal, get_args

Precision = Literal["fp32", "bf16", "8bit", "4bit"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
RANK = 16  # of the adapters that are proposed where full fine-tuning does not fit


@dataclasses.dataclass(frozen=True)
class TrainingPlan:
    """Describes a run as far as its memory goes.

    Args:
        model: a model id, a folder with `config.json`, or a config file.
        base: precision of the weights that are loaded. All but fp32 compute under bf16 autocast, as with `bf16=True`.
        rank: of LoRA; None trains every weight.
        target: PEFT's `target_modules`: `"all-linear"`, or names with commas between.
        batch: sequences, or images, on a device at once.
        sequence_length: tokens of a sequence.
        checkpointing: whether gradient checkpointing is on.

    Raises:
        ValueError: a number is below 1, the precision does not exist, or whole quantized weights would be trained.
    """

    model: str
    base: Precision = "bf16"
    rank: int | None = None
    target: str = "all-linear"
    batch: int = 1
    sequence_length: int = 1024
    checkpointing: bool = False

    def __post_init__(self) -> None:
        """Checks what the user said."""
        for name in ("rank", "batch", "sequence_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.base not in PRECISIONS:
            raise ValueError(f"base must be one of {', '.join(PRECISIONS)}, got {self.base!r}")
        if self.is_quantized and self.rank is None:
            raise ValueError(
                f"weights in {self.base} are not trained themselves; add --peft lora, or load them as bf16"
            )

    @property
    def is_quantized(self) -> bool:
        """Whether linear layers hold bitsandbytes' codes."""
        return self.base in ("8bit", "4bit")

    def replace(self, **changes: Any) -> "TrainingPlan":
        """Returns a plan with some fields changed."""
        return dataclasses.replace(self, **changes)


def smaller_plans(plan: TrainingPlan) -> Iterator[tuple[str, TrainingPlan]]:
    """Yields changes that need less memory, from what costs least to what changes the run most, with their options."""
    smaller: list[TrainingPlan] = []
    for kind in _thriftier_kinds(plan):
        checkpointed = kind.replace(checkpointing=True)
        halved = [checkpointed.replace(batch=plan.batch >> i) for i in range(1, plan.batch.bit_length())]
        smaller += [kind, checkpointed, *halved]
    yield from ((_options(plan, changed), changed) for changed in dict.fromkeys(smaller) if changed != plan)


def _thriftier_kinds(plan: TrainingPlan) -> Iterator[TrainingPlan]:
    """Yields the plan, and what holds smaller weights or trains fewer."""
    yield plan
    if plan.rank is not None:
        yield plan.replace(base="4bit")
        return
    yield plan.replace(base="bf16")
    yield plan.replace(rank=RANK)
    yield plan.replace(rank=RANK, base="4bit")


def _options(plan: TrainingPlan, changed: TrainingPlan) -> str:
    """Writes a change as options of the command line."""
    options = []
    if changed.rank != plan.rank:
        options.append(f"--peft lora --r {changed.rank}")
    if changed.base != plan.base:
        options.append(f"--base {changed.base}")
    if changed.checkpointing != plan.checkpointing:
        options.append("--gradient-checkpointing")
    if changed.batch != plan.batch:
        options.append(f"--batch {changed.batch}")
    return " ".join(options)
