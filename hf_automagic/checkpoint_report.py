"""What `hf-automagic doctor` says of a checkpoint: is it whole, what is in it, would it resume exactly."""

import dataclasses
import json
import pickle
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from .checkpoint import find_problems, has_manifest, list_checkpoints
from .optim.automagic import SCHEMA

LARGEST_HEADER = 2**28  # bytes; a longer one is no table of tensors


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """What was found out about one checkpoint.

    Args:
        name: of its folder.
        facts: what it holds, a line each.
        obstacles: why it would not resume exactly, a sentence each; empty where it would.
        remarks: what an exact resume needs beside the files.
    """

    name: str
    facts: tuple[str, ...]
    obstacles: tuple[str, ...]
    remarks: tuple[str, ...] = ()

    @property
    def resumes_exactly(self) -> bool:
        """Whether nothing stands in the way of a resume to the bit."""
        return not self.obstacles

    def lines(self) -> list[str]:
        """Returns the report, line by line."""
        verdict = "yes" if self.resumes_exactly else "no"
        return [
            self.name,
            *(f"  {fact}" for fact in self.facts),
            f"  would resume exactly: {verdict}",
            *(f"    {sentence}" for sentence in (*self.obstacles, *self.remarks)),
        ]


def diagnose(folder: str | Path) -> Diagnosis:
    """Looks at a checkpoint, or at the newest one of an output folder; nothing in it is executed.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder.name!r}; name a checkpoint-N or an output folder")
    newest = list_checkpoints(folder)
    folder = newest[0] if newest else folder
    problems = find_problems(folder)
    noted = "as noted when it was saved" if has_manifest(folder) else "no manifest; by the files' own structure"
    facts = [f"complete: {'no' if problems else 'yes'} ({noted})"]
    obstacles = list(problems)
    remarks: list[str] = []
    if not any(folder.glob("rng_state*.pth")):
        obstacles.append("it lacks rng_state.pth: dropout and the order of the data would differ")
    dtypes = _weight_dtypes(folder)
    if dtypes:
        facts.append(f"weights: {_listed(dtypes)}")
    if (folder / "adapter_config.json").is_file() and {"BF16", "F16"} & set(dtypes):
        remarks.append("its adapter is in 16 bits: PEFT loads it in fp32 unless AutomagicTrainer resumes it")
    if (folder / "optimizer.pt").is_file():
        found = _look_at_optimizer(folder / "optimizer.pt")
        facts += found.facts
        obstacles += found.obstacles
        remarks += found.remarks
    elif not problems:
        remarks.append("its optimizer state is sharded over ranks, and has not been looked into")
    return Diagnosis(folder.name, tuple(facts), tuple(obstacles), tuple(remarks))


def _look_at_optimizer(path: Path) -> Diagnosis:
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        groups, states = saved["param_groups"], saved["state"]
        schemas = {group.get("schema") for group in groups}
    except pickle.UnpicklingError:
        return Diagnosis(path.name, (), (f"{path.name} holds more than tensors and numbers, and was not opened",))
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return Diagnosis(path.name, (), (f"{path.name} holds no optimizer state that torch reads",))
    if not groups or None in schemas:
        return Diagnosis(path.name, ("optimizer: not hf_automagic's",), ("only hf_automagic's states are known here",))
    obstacles = []
    if max(schemas) > SCHEMA:
        obstacles.append(f"its schema is {max(schemas)}, this version reads up to {SCHEMA}; upgrade hf_automagic")
    counters = groups[0].get("counters", {})
    applied, skipped = (int(counters.get(name, 0)) for name in ("applied", "skipped"))
    if applied and not states:
        obstacles.append(f"{path.name} has counted {applied} steps and holds no states")
    facts = (
        f"optimizer: hf_automagic, schema {max(schemas)}, {applied} steps applied, {skipped} skipped",
        f"states: {len(states)} parameters, {_listed(_state_dtypes(states.values()))}",
        f"stored as: {_listed(Counter(_storage(group) for group in groups))}",
    )
    remarks = () if obstacles else ("an optimizer that stores its states otherwise converts them, and says so",)
    return Diagnosis(path.name, facts, tuple(obstacles), remarks)


def _storage(group: Mapping[str, Any]) -> str:
    return f"{group.get('codec')} in blocks of {group.get('block_size')}" if group.get("quantize_states") else "fp32"


def _state_dtypes(states: Iterable[Mapping[str, Any]]) -> Counter[str]:
    tensors = [t for state in states for t in state.values() if isinstance(t, torch.Tensor)]
    return Counter(str(t.dtype).removeprefix("torch.") for t in tensors)


def _weight_dtypes(folder: Path) -> Counter[str]:
    """Counts the dtypes in the headers of all safetensors files, by their names there."""
    dtypes: Counter[str] = Counter()
    for path in folder.rglob("*.safetensors"):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = file.read(length) if length < LARGEST_HEADER else b""
        try:
            dtypes.update(entry["dtype"] for name, entry in json.loads(header).items() if name != "__metadata__")
        except (ValueError, TypeError, KeyError, AttributeError):
            continue  # find_problems says so
    return dtypes


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} x {name}" for name, count in sorted(counts.items())) or "none"
