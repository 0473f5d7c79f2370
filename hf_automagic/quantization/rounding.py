"""Stochastic rounding that draws from a counter (seed, parameter, step, position): alike on ranks and resumes."""

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def random_bits(keys: Tensor, offset: int, numel: int) -> Tensor:
    """Returns uniform 32-bit integers for consecutive positions  # [n, numel], int64

    A murmur3 finaliser over key and position: cheap, stateless, the same on every device.

    Args:
        keys: one 32-bit key for each parameter and step  # [n], int64
        offset: position of the first element within its parameter.
        numel: how many positions.
    """
    position = torch.arange(offset, offset + numel, device=keys.device, dtype=torch.int64)
    return _bits_at(position, keys)


def random_halves(keys: Tensor, offset: int, numel: int) -> Tensor:
    """Returns uniform 16-bit integers for consecutive positions  # [n, numel], int32

    Two neighbours share the 32 bits of the even position: its own are the lower ones.

    Args:
        keys: one 32-bit key for each parameter and step  # [n], int64
        offset: position of the first element within its parameter, even or odd.
        numel: how many positions.
    """
    if torch.compiler.is_compiling():  # within the loop that rounds: a stack of halves would be a loop of its own
        position = torch.arange(offset, offset + numel, device=keys.device, dtype=torch.int64)
        return ((_bits_at(position & ~1, keys) >> (position & 1) * 16) & 0xFFFF).to(torch.int32)
    surplus = offset % 2  # the even neighbour of the first position, which is cut off again
    even = torch.arange(offset - surplus, offset + numel, 2, device=keys.device, dtype=torch.int64)
    halves = _bits_at(even, keys).to(torch.int32).view(torch.int16)  # the lower half lies first
    return halves[:, surplus : surplus + numel].to(torch.int32) & 0xFFFF


def _bits_at(position: Tensor, keys: Tensor) -> Tensor:
    return _mix((position * 0x9E3779B1 + keys[:, None]) & _MASK)


def step_keys(seed: int, parameters: Tensor, step: Tensor) -> Tensor:
    """Returns the key of each parameter for a step  # [n], int64

    Args:
        seed: the optimizer's seed.
        parameters: stable number of each parameter  # [n], int64
        step: applied steps of each  # [n]
    """
    return _mix(_mix((parameters * 0x85EBCA77 + seed) & _MASK) ^ _mix((step.to(torch.int64) * 0x27D4EB2F) & _MASK))


def keys_for(keys: Tensor, purpose: int) -> Tensor:
    """Returns other keys for another use of the same step, so that two tensors do not round alike  # [n], int64

    Args:
        keys: from `step_keys`  # [n], int64
        purpose: any 32-bit number that tells the uses apart.
    """
    return _mix(keys ^ purpose)


def _mix(bits: Tensor) -> Tensor:
    bits = bits ^ (bits >> 16)
    bits = (bits * 0x85EBCA6B) & _MASK
    bits = bits ^ (bits >> 13)
    bits = (bits * 0xC2B2AE35) & _MASK
    return bits ^ (bits >> 16)


def round_stochastically(values: Tensor, dtype: torch.dtype, bits: Tensor) -> Tensor:
    """Rounds float32 to one of its two neighbours in `dtype`, so that the mean is the value itself.

    A value that `dtype` can hold is never changed. A value that has no neighbour on one side, at the end of the range,
    is cast as usual.

    Args:
        values: any shape, float32.
        dtype: bfloat16 or float16.
        bits: uniform 16-bit integers of the same shape, int32.
    """
    rounded = _round_bfloat16(values, bits) if dtype == torch.bfloat16 else _round_float16(values, bits)
    return torch.where(values.abs() <= torch.finfo(dtype).max, rounded, values).to(dtype)


def _round_bfloat16(values: Tensor, bits: Tensor) -> Tensor:
    """Adds noise below the last bit that bfloat16 keeps, and cuts  # float32"""
    return ((values.view(torch.int32) + bits) & ~0xFFFF).view(torch.float32)


def _round_float16(values: Tensor, bits: Tensor) -> Tensor:
    """Rounds on the grid of float16: 10 bits behind the leading one, and 2^-24 below 2^-14  # float32"""
    exponent = torch.frexp(values).exponent.clamp_min(-13)
    unit = torch.ldexp(torch.ones_like(values), exponent - 11)
    # 13 bits of noise for the 13 bits that float16 lacks: fewer would round down more often than up
    noise = (bits & 0x1FFF).to(torch.float32) / 0x2000
    return torch.copysign((values / unit + noise).floor() * unit, values)  # a -0 stays one
