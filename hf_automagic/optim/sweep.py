"""What a step hands to its buckets, and how far the sweeps over their rows have come: nothing is done twice."""

import dataclasses
import functools
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from ..kernels.choice import bit_mask

Writes = list[tuple[Tensor, Tensor]]  # (where, what): computed in full before the first is carried out


@dataclasses.dataclass(frozen=True)
class StepInputs:
    """What a step hands to every bucket of a device.

    Args:
        lr: the group's rate really applied  # [], float32
        finite: whether the step may change anything  # [], bool
        clip: factor for the gradients, None for none  # []
        row_gain: ALLoRA's gains of the bucket's parameters, None without pairs  # [n, rows] or [n, 1]
    """

    lr: Tensor
    finite: Tensor
    clip: Tensor | None
    row_gain: Tensor | None = None

    @functools.cached_property
    def mask(self) -> Tensor:
        """Returns the flag as bits, see `kernels.choice`  # [], int64"""
        return bit_mask(self.finite)


@dataclasses.dataclass(eq=False)
class Sweep:
    """How far a chunk of a bucket has come in a step.

    Args:
        totals: sums over whole matrices, one entry for each pass that measured them; None where one piece is all.
        written: pieces of rows whose weights and states are written.
        pool: the pooled sums of these  # each []
        squares: sum of the squared changes of their weights  # []
        whole: new states that are written after the last piece.
        is_over: whether everything of the chunk is written.
    """

    totals: list[dict[str, Tensor]] | None = None
    written: int = 0
    pool: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    squares: Tensor | float = 0.0
    whole: dict[str, list[Tensor]] = dataclasses.field(default_factory=dict)
    is_over: bool = False

    def joined(self, along_rows: Collection[str]) -> dict[str, Tensor]:
        """Puts together what the pieces left to write; `along_rows` names the vectors  # each [n, ...]"""
        return {name: torch.cat(parts, 1) if name in along_rows else parts[-1] for name, parts in self.whole.items()}


def carry_out(writes: Writes) -> None:
    """Writes what has been computed; allocates nothing, so that memory cannot run out in between."""
    for target, value in writes:
        target.copy_(value)


def added(sums: Mapping[str, Tensor], more: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Adds up two sets of sums; what only one of them has is kept  # each like its entry"""
    return {**sums, **{name: sums[name] + value if name in sums else value for name, value in more.items()}}
