"""Arithmetic that the kernels share; each function equals one of `quantization` or `transforms`."""

import torch
import triton
import triton.language as tl

from . import support

VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
IS_INTERPRETED = tl.constexpr(support.is_interpreted())
IS_NVIDIA = tl.constexpr(torch.version.hip is None and not support.is_interpreted())
FLOAT_MAX = tl.constexpr(3.4028234663852886e38)
LARGEST_GRADIENT = tl.constexpr(support.LARGEST_GRADIENT)
HALF_MAX = tl.constexpr(65504.0)
SMALLEST_SCALE = tl.constexpr(2.0**-14)
TO_INTEGER = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it rounds to an integer, ties to even
CODES_PER_OCTAVE = tl.constexpr(1365)
OCTAVES_BELOW = tl.constexpr(32)
HIGHEST = tl.constexpr(65534)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def mix(bits):
    """A murmur3 finaliser  # uint32"""
    bits = bits ^ (bits >> 16)
    bits = bits * 0x85EBCA6B
    bits = bits ^ (bits >> 13)
    bits = bits * 0xC2B2AE35
    return bits ^ (bits >> 16)


@triton.jit
def step_key(seed, number, step):
    """The key of a parameter for a step, `rounding.step_keys`  # uint32"""
    parameter = number.to(tl.uint32) * 0x85EBCA77 + seed.to(tl.uint32)
    return mix(mix(parameter) ^ mix(step.to(tl.int64).to(tl.uint32) * 0x27D4EB2F))


@triton.jit
def random_halves(key, position, PAIRED: tl.constexpr):
    """Uniform 16 bits for each position, `rounding.random_halves`  # uint32

    Args:
        key: from `step_key`.
        position: of each element within its parameter.
        PAIRED: whether along the last axis each position at an even place is even, and the next is its neighbour: then
            a pair's bits are mixed once, which the compiler would not see.
    """
    place = position.to(tl.uint32)
    if PAIRED:
        even, _ = tl.split(tl.reshape(place, [place.numel // 2, 2]))
        both = mix(even * 0x9E3779B1 + key)
        return tl.reshape(tl.interleave(both & 0xFFFF, both >> 16), place.shape)
    else:
        both = mix((place & 0xFFFFFFFE) * 0x9E3779B1 + key)
        return (both >> ((place & 1) * 16)) & 0xFFFF


@triton.jit
def round_even(x):
    """Rounds |x| < 2^22 to an integer, ties to even."""
    return (x + TO_INTEGER) - TO_INTEGER


@triton.jit
def reciprocal(x):
    """1 / x for normal x, to a unit in the last place: one instruction where a division takes eight."""
    if IS_NVIDIA:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


@triton.jit
def product(a, b, IS_SUMMED_FIRST: tl.constexpr):
    """Returns a product that a sum over threads follows.

    A thread with a single product would add the others' to it in one rounding, and the sum's copies in several threads
    would differ in the last place: it is rounded on its own, unless each thread sums several products first.
    """
    if IS_NVIDIA and not IS_SUMMED_FIRST:
        return tl.inline_asm_elementwise(
            "mul.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return a * b


@triton.jit
def low_byte(x):
    """Rounds |x| < 2^22 to an integer, ties to even, and returns its last 8 bits  # int8"""
    return (x + TO_INTEGER).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def _add_three(a, b, c, other_a, other_b, other_c):
    return a + other_a, b + other_b, c + other_c


@triton.jit
def sum_three(a, b, c, AXIS: tl.constexpr):
    """Sums three tensors along an axis in one exchange between threads."""
    if IS_INTERPRETED:
        return tl.sum(a, AXIS), tl.sum(b, AXIS), tl.sum(c, AXIS)
    else:
        return tl.reduce((a, b, c), AXIS, _add_three)


@triton.jit
def one_minus_power(log_beta, step):
    """1 - beta^step without cancellation; 1 where beta is 0, whose logarithm is -inf."""
    x = log_beta * step
    small = 1.0 + x * (1.0 / 8)
    small = 1.0 + x * (1.0 / 7) * small
    small = 1.0 + x * (1.0 / 6) * small
    small = 1.0 + x * (1.0 / 5) * small
    small = 1.0 + x * (1.0 / 4) * small
    small = 1.0 + x * (1.0 / 3) * small
    small = x * (1.0 + x * (1.0 / 2) * small)
    return tl.where(x > -0.5, -small, 1.0 - tl.exp(x))


@triton.jit
def exponent_of(x):
    """The exponent of frexp for normal x > 0: x = mantissa * 2^exponent, mantissa in [0.5, 1)  # int32"""
    return ((x.to(tl.int32, bitcast=True) >> 23) & 0xFF) - 126


@triton.jit
def power_of_two(exponent):
    """2^exponent, exponent in [-126, 127]  # float32"""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def load_momentum(
    line_codes,
    scale_address,
    zero_address,
    offsets,
    shared,
    mask,
    shared_mask,
    KIND: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Decodes momenta: KIND 0 float32, 1 softsign, 2 affine."""
    if KIND == 0:
        plain = line_codes.to(tl.pointer_type(tl.float32))
        if ALIGNED:
            plain = tl.multiple_of(plain, 16)
        return tl.load(plain + offsets, mask=mask, other=0.0)
    elif KIND == 1:
        codes = line_codes.to(tl.pointer_type(tl.int8))
        if ALIGNED:
            codes = tl.multiple_of(codes, 16)
        code = tl.load(codes + offsets, mask=mask, other=0).to(tl.float32)
        scale = tl.load(scale_address.to(tl.pointer_type(tl.float16)) + shared, mask=shared_mask, other=0.0)
        return (code * reciprocal(254.0 - tl.abs(code))) * scale.to(tl.float32)[:, :, None]
    else:
        codes = line_codes.to(tl.pointer_type(tl.uint8))
        if ALIGNED:
            codes = tl.multiple_of(codes, 16)
        code = tl.load(codes + offsets, mask=mask, other=0).to(tl.float32)
        scale = tl.load(scale_address.to(tl.pointer_type(tl.float32)) + shared, mask=shared_mask, other=0.0)
        zero = tl.load(zero_address.to(tl.pointer_type(tl.float32)) + shared, mask=shared_mask, other=0.0)
        return tl.where(mask, code * scale[:, :, None] + zero[:, :, None], 0.0)


@triton.jit
def store_momentum(
    value,
    line_codes,
    scale_address,
    zero_address,
    offsets,
    shared,
    mask,
    shared_mask,
    KIND: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Encodes momenta [rows, blocks, block] to the nearest codes; elements outside the mask are zero."""
    if KIND == 0:
        plain = line_codes.to(tl.pointer_type(tl.float32))
        if ALIGNED:
            plain = tl.multiple_of(plain, 16)
        tl.store(plain + offsets, value, mask=mask)
    elif KIND == 1:
        largest = tl.minimum(tl.max(tl.abs(value), 2), HALF_MAX)
        scale = tl.where(largest < SMALLEST_SCALE, 0.0, largest).to(tl.float16)
        tl.store(scale_address.to(tl.pointer_type(tl.float16)) + shared, scale, mask=shared_mask)
        wide = scale.to(tl.float32)
        inverse = tl.where(wide > 0, reciprocal(tl.where(wide > 0, wide, 1.0)), 0.0)
        z = value * inverse[:, :, None]  # at most 1 and what the scale lost: no momentum comes near HALF_MAX
        code = low_byte(254.0 * (z * reciprocal(1.0 + tl.abs(z))))
        codes = line_codes.to(tl.pointer_type(tl.int8))
        if ALIGNED:
            codes = tl.multiple_of(codes, 16)
        tl.store(codes + offsets, code, mask=mask)
    else:
        zero = tl.min(tl.where(mask, value, FLOAT_MAX), 2)
        scale = (tl.max(tl.where(mask, value, -FLOAT_MAX), 2) - zero) / 255.0
        tl.store(scale_address.to(tl.pointer_type(tl.float32)) + shared, scale, mask=shared_mask)
        tl.store(zero_address.to(tl.pointer_type(tl.float32)) + shared, zero, mask=shared_mask)
        divisor = tl.where(scale > 0, scale, 1.0)[:, :, None]
        steps = round_even(tl.minimum(tl.maximum((value - zero[:, :, None]) / divisor, 0.0), 255.0))
        codes = line_codes.to(tl.pointer_type(tl.uint8))
        if ALIGNED:
            codes = tl.multiple_of(codes, 16)
        tl.store(codes + offsets, tl.where((scale > 0)[:, :, None], steps, 0.0).to(tl.uint8), mask=mask)


@triton.jit
def round_randomly(value, bits, DTYPE: tl.constexpr):
    """Rounds float32 to a neighbour in bfloat16 or float16, `rounding.round_stochastically`."""
    if tl.bfloat16 == DTYPE:
        pattern = value.to(tl.uint32, bitcast=True) + bits
        rounded = (pattern & 0xFFFF0000).to(tl.float32, bitcast=True)
        return tl.where(tl.abs(value) <= 3.3895313892515355e38, rounded, value)
    else:
        exponent = tl.maximum(exponent_of(value), -13)
        unit = power_of_two(exponent - 11)
        noise = (bits & 0x1FFF).to(tl.float32) * (1.0 / 8192)
        rounded = tl.floor(value * power_of_two(11 - exponent) + noise) * unit
        sign = value.to(tl.uint32, bitcast=True) & 0x80000000
        rounded = ((rounded.to(tl.uint32, bitcast=True) & 0x7FFFFFFF) | sign).to(tl.float32, bitcast=True)
        return tl.where(tl.abs(value) <= HALF_MAX, rounded, value)
