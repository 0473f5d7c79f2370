"""Block sizes by measurement: the largest block whose rounding error a matrix can bear."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .core import Codec, Fields
from .feedback import WithFeedback
from .rounding import random_bits


def unrounded(codec: Codec, fields: Fields) -> Tensor:
    """Decodes to values as they may have been before rounding, moved at random within half a spacing, always alike.

    What comes straight out of a codec would show no error where the same codes are tried again.
    """
    values = codec.decode(fields)
    bits = random_bits(torch.zeros(1, dtype=torch.int64, device=values.device), 0, values.numel()).view(values.shape)
    return values + ((bits >> 8).to(torch.float32) * 2.0**-24 - 0.5) * codec.spacing(fields)


def relative_error(codec: Codec, values: Tensor) -> Tensor:
    """Returns the relative L2 error of storing values, NaN where all are zero  # [n, rows, cols] -> []"""
    error = codec.decode(codec.encode(values)) - values
    return error.norm() / values.norm()


def errors_by_block(codec: Codec, fields: Fields, sizes: Sequence[int]) -> Tensor:
    """Returns the relative error that stored values would have at each block size  # [len(sizes)]"""
    values = unrounded(codec, fields)
    return torch.stack([relative_error(with_block_size(codec, size), values) for size in sizes])


def with_block_size(codec: Any, size: int) -> Codec:
    """Returns the same codec with another block size."""
    if isinstance(codec, WithFeedback):
        return dataclasses.replace(codec, codec=with_block_size(codec.codec, size))
    return dataclasses.replace(codec, block_size=size)


def largest_fitting(errors: Sequence[float], sizes: Sequence[int], target: float) -> int | None:
    """Returns the largest block whose error meets the target, or else the smallest; None where errors are unknown."""
    if any(math.isnan(error) for error in errors):
        return None
    return max((size for size, error in zip(sizes, errors, strict=True) if error <= target), default=min(sizes))


def block_sizes(smallest: int, largest: int) -> list[int]:
    """Lists the powers of two between two block sizes."""
    return [2**k for k in range(smallest.bit_length() - 1, largest.bit_length())]
