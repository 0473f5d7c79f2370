"""What is stored: the new values, or the old ones where a step is skipped."""

import torch
from torch import Tensor

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # an element's bytes as an integer


def bit_mask(finite: Tensor) -> Tensor:
    """Returns all bits where a step may change something, none where not  # [] -> [], int64"""
    return -finite.to(torch.int64)


def choose(mask: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """Returns new or old values, of the same dtype; whatever the others are, NaN among them, leaves no trace.

    It is `torch.where`, of which a CPU needs five times as long, of codes in a compiled step as well: neither their
    kernels for it nor their masks of bytes use vectors (torch 2.13).

    Args:
        mask: from `bit_mask`.
        new: chosen where the mask has its bits.
        old: chosen where it has none.
    """
    if new.is_floating_point() and torch.compiler.is_compiling():
        return torch.where(mask != 0, new, old)
    bits, old_bits = _bits(new), _bits(old)
    return (bits ^ old_bits).bitwise_and_(mask.to(bits.dtype)).bitwise_xor_(old_bits).view(new.dtype)


def choose_or_zero(mask: Tensor, new: Tensor) -> Tensor:
    """Returns new values, or zeros."""
    bits = _bits(new)
    return (bits & mask.to(bits.dtype)).view(new.dtype)


def _bits(values: Tensor) -> Tensor:
    return values.view(BITS[values.element_size()])
