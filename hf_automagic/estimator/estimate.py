"""Adds up what a training run holds, and says whether a GPU has room for it."""

import dataclasses
import gc
from collections.abc import Mapping, Sequence
from typing import Literal

import torch

from ..integrations.activations import simulate_peak
from .meta_model import build, example_inputs, largest_linear
from .optimizers import state_bytes
from .plan import TrainingPlan

Verdict = Literal["FITS", "TIGHT", "NO"]

CONTEXT_BYTES = 768 * 2**20  # what CUDA and cuBLAS take on an H100 beside the tensors, see model_cards/memory.jsonl
ROOM = 0.9  # of a GPU: the caching allocator's gaps take some of the rest


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Bytes of a training run.

    Args:
        plan: what was estimated.
        frozen_bytes: of weights that are not trained, and of buffers; exact.
        trained_bytes: of weights that are; exact.
        trained: number of their elements.
        gradient_bytes: of all gradients; exact.
        activation_bytes: an estimate: what the forward and backward pass hold at the worst moment beyond gradients.
        optimizer_bytes: of each optimizer's state; exact.
    """

    plan: TrainingPlan
    frozen_bytes: int
    trained_bytes: int
    trained: int
    gradient_bytes: int
    activation_bytes: int
    optimizer_bytes: Mapping[str, int]

    def allocated_bytes(self, optimizer: str) -> int:
        """Returns the peak of tensors, which `torch.cuda.max_memory_allocated()` would show."""
        held = self.frozen_bytes + self.trained_bytes + self.gradient_bytes + self.activation_bytes
        return held + self.optimizer_bytes[optimizer]

    def total_bytes(self, optimizer: str) -> int:
        """Returns what the device needs, CUDA's own share included."""
        return self.allocated_bytes(optimizer) + CONTEXT_BYTES

    def verdict(self, optimizer: str, device_bytes: int) -> Verdict:
        """Says whether it fits with a tenth to spare, fits at all, or not."""
        needed = self.total_bytes(optimizer)
        return "FITS" if needed <= ROOM * device_bytes else "TIGHT" if needed <= device_bytes else "NO"


def estimate_memory(plan: TrainingPlan, optimizers: Sequence[str] = ("automagic_8bit",)) -> Estimate:
    """Estimates a run with each of some optimizers.

    ```python
    plan = TrainingPlan("Qwen/Qwen3-0.6B", rank=16, batch=4, sequence_length=2048, checkpointing=True)
    print(estimate_memory(plan, ["automagic_8bit", "adamw_torch"]).total_bytes("automagic_8bit"))
    ```

    Args:
        plan: what is to be trained.
        optimizers: registered names, or other `optim=` strings of transformers.

    Raises:
        TypeError: there is no optimizer of a name.
        ValueError: there is no such model, or it cannot be trained this way.
    """
    model, frozen_bytes = build(plan)
    trained = [p for p in model.parameters() if p.requires_grad]
    trained_bytes = sum(p.numel() * p.element_size() for p in trained)
    states = {name: state_bytes(name, model) for name in optimizers}
    compute = torch.float32 if plan.base == "fp32" else torch.bfloat16
    inputs = example_inputs(model, plan)
    try:
        peak = simulate_peak(model, inputs, compute, checkpointing=plan.checkpointing)
    except AttributeError as error:  # None has none, which stands for the input that is missing
        told = f"{type(model).__name__} cannot be played with {' and '.join(inputs)} alone"
        raise ValueError(f"{told}: {error}") from error
    if plan.is_quantized:
        peak += 2 * largest_linear(model)
    del model
    gc.collect()  # hooks of checkpointing tie the model to itself
    return Estimate(
        plan=plan,
        frozen_bytes=frozen_bytes,
        trained_bytes=trained_bytes,
        trained=sum(p.numel() for p in trained),
        gradient_bytes=trained_bytes,
        activation_bytes=max(0, peak - trained_bytes),
        optimizer_bytes=states,
    )
