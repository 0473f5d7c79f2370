"""What a step hands to its buckets, and what a sweep over their rows hands back."""

import dataclasses

from torch import Tensor


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


@dataclasses.dataclass(frozen=True)
class Swept:
    """What one sweep over the rows of a chunk found.

    Args:
        sums: partial sums that a further sweep waits for, empty once the parameters are written  # each [n, ...]
        whole: new states that take all rows of a matrix to encode  # each [n, ...]
        pool: sums over all parameters  # each []
    """

    sums: dict[str, Tensor]
    whole: dict[str, Tensor]
    pool: dict[str, Tensor]
