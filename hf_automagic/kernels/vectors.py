# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
# the types of triton.jit functions are of the compiler that runs them, not of Python
"""Row and column averages between the sweeps: partial sums become averages, and averages codes of 16 bits.

A program owns a slice of one vector. Sums over a whole vector are the sums of its slices, added up by whoever needs
them.
"""

import triton
import triton.language as tl

from . import fields as f
from .arithmetic import (
    CODES_PER_OCTAVE,
    HIGHEST,
    LN2,
    OCTAVES_BELOW,
    exponent_of,
    mix,
    power_of_two,
    step_key,
    sum_three,
)
from .tiles import bound, sum_of, vector_at

RESIDUAL_FLOOR = tl.constexpr(2.0**-20)
ALMOST = tl.constexpr(2.0**-10)
SHORT = tl.constexpr(64)  # elements of a vector, at most, whose tiles are shared out


@triton.jit
def _slice_of(slices, table):
    """Returns tensor, line of the table, whether the vector lies along the columns, places [VS] start, lengths."""
    pid = tl.program_id(0)
    tensor = tl.load(slices + 3 * pid)
    line = table + tensor.to(tl.int64) * f.WIDTH
    side = tl.load(slices + 3 * pid + 1)
    rows, cols = tl.load(line + f.ROWS), tl.load(line + f.COLS)
    length, other = rows, cols
    count = tl.load(line + f.COL_TILES)
    part = tl.load(line + f.ROW_PARTS)
    if side == 1:
        length, other = cols, rows
        count = tl.load(line + f.ROW_TILES)
        part = tl.load(line + f.COL_PARTS)
    return tensor, line, side, tl.load(slices + 3 * pid + 2), length, other, count, part


@triton.jit
def _sum_parts(parts, plane, count, length, place, mask, PLANES: tl.constexpr, VS: tl.constexpr):
    """Adds up the partial sums of a slice's elements over all tiles, of one plane or of three  # 3 of [VS]

    A short vector has few elements and many tiles: threads share the tiles. A long one has few tiles.
    """
    one = tl.zeros([VS], tl.float32)
    two = tl.zeros([VS], tl.float32)
    three = tl.zeros([VS], tl.float32)
    if length <= SHORT:
        one = _sum_short(parts, count, length, VS)
        if PLANES == 3:
            two = _sum_short(parts + plane, count, length, VS)
            three = _sum_short(parts + 2 * plane, count, length, VS)
    else:
        for tile in tl.range(0, bound(count)):
            some = parts + tile * length + place
            one += tl.load(some, mask=mask, other=0.0)
            if PLANES == 3:
                two += tl.load(some + plane, mask=mask, other=0.0)
                three += tl.load(some + 2 * plane, mask=mask, other=0.0)
    return one, two, three


@triton.jit
def _sum_short(parts, count, length, VS: tl.constexpr):
    """Adds up the partial sums of a vector of at most SHORT elements; they are repeated to the length of a slice."""
    tile = tl.arange(0, VS // SHORT)
    place = tl.arange(0, SHORT)
    total = tl.zeros([VS // SHORT, SHORT], tl.float32)
    for first in tl.range(0, bound(count), VS // SHORT):
        there = (first + tile < count)[:, None] & (place < length)[None, :]
        total += tl.load(parts + (first + tile)[:, None] * length + place[None, :], mask=there, other=0.0)
    return tl.reshape(tl.broadcast_to(tl.sum(total, 0)[None, :], VS // SHORT, SHORT), VS)


@triton.jit
def _decode16(codes, scale):
    """Decodes `quantization.Log16`."""
    code = codes.to(tl.int32) & 0xFFFF
    octave = (code - 1) // 1365
    part = (code - 1 - octave * CODES_PER_OCTAVE).to(tl.float32) / 1365.0
    value = tl.exp2(part) * power_of_two(octave - OCTAVES_BELOW)
    return tl.where(code > 0, value * scale, 0.0)


@triton.jit
def _read(line, number, work, place, mask):
    """Reads one of the four vectors as it was after the step before."""
    codes = tl.load(line + f.CODES + number)
    if codes != 0:
        scale = tl.load(tl.load(line + f.CODE_SCALES + number).to(tl.pointer_type(tl.float32)))
        stored = tl.load(codes.to(tl.pointer_type(tl.int16)) + place, mask=mask, other=0)
        value = _decode16(stored, scale)
    else:
        value = tl.load(vector_at(tl.load(line + f.VECTORS + number), work) + place, mask=mask, other=0.0)
    return value


@triton.jit
def average_squares(slices, table, grads, groups, parts, slice_sums, work, finite, clip, VS: tl.constexpr):
    """After sweep 1: R and C, the averages of g^2 over rows and columns."""
    tensor, line, side, first, length, other, count, part = _slice_of(slices, table)
    steps = (tl.load(grads + tensor) != 0) & (tl.load(finite) != 0)  # what is written; nothing waits for it to read
    group = groups + tl.load(line + f.GROUP) * f.GROUP_WIDTH
    place = first + tl.arange(0, VS)
    mask = place < length
    factor = tl.load(clip)
    old = _read(line, side, work, place, mask)
    total, _, _ = _sum_parts(parts + part, 0, count, length, place, mask, 1, VS)
    seen = total / other.to(tl.float32) * (factor * factor)
    new = tl.where(mask, old + tl.load(group + f.WEIGHT2) * (seen - old), 0.0)
    tl.store(vector_at(tl.load(line + f.VECTORS + side), work) + place, new, mask=mask & steps)
    tl.store(slice_sums + tl.program_id(0), tl.sum(new, 0), mask=steps)


@triton.jit
def average_residuals(
    slices, table, grads, groups, parts, plane, sums, n_tiles, stats, residual_sums, n_slices, work, finite,
    VS: tl.constexpr, MEASURES: tl.constexpr,
):  # fmt: skip
    """After sweep 2: the clip s of the update, R' and C', the averages of (u - m')^2, and the pooled sums.

    sum (u - m')^2 = beta1^2 (s^2 sum u^2 - 2 s sum u m + sum m^2), u before its clip, m the momentum before this step,
    and likewise sum m'^2, for the length of the direction (see `transforms.Confidence`).
    """
    tensor, line, side, first, length, other, count, part = _slice_of(slices, table)
    steps = (tl.load(grads + tensor) != 0) & (tl.load(finite) != 0)
    group = groups + tl.load(line + f.GROUP) * f.GROUP_WIDTH
    mine = sums + tl.load(line + f.FIRST_TILE)
    place = first + tl.arange(0, VS)
    mask = place < length
    old = _read(line, 2 + side, work, place, mask)
    uu, um, mm = _sum_parts(parts + part, plane, count, length, place, mask, 3, VS)
    tiles = tl.load(line + f.COL_TILES) * tl.load(line + f.ROW_TILES)
    total = sum_of(mine + f.SUM_UPDATE * n_tiles, tiles, 256)
    mean_square = total / (length.to(tl.float32) * other.to(tl.float32))
    factor = tl.maximum(tl.sqrt(mean_square) / tl.load(group + f.CLIP), 1.0)
    s = 1.0 / factor
    if (side == 0) & (first == 0) & steps:
        out = stats + tensor * f.STATS_WIDTH
        tl.store(out + f.CLIPPED, s)
        if MEASURES:
            tl.store(out + f.AGREEMENT, s * sum_of(mine + f.SUM_AGREEMENT * n_tiles, tiles, 256))
            tl.store(out + f.UPDATE, s * s * total)
            tl.store(out + f.SQUARE, sum_of(mine + f.SUM_MOMENTUM * n_tiles, tiles, 256))
    beta1 = tl.load(group + f.BETA1)
    seen = beta1 * beta1 * (s * s * uu - 2.0 * s * um + mm) / other.to(tl.float32)
    seen = tl.maximum(seen, RESIDUAL_FLOOR * (mean_square * s * s)) + tl.load(group + f.EPS)
    new = tl.where(mask, old + tl.load(group + f.WEIGHT3) * (seen - old), 0.0)
    tl.store(vector_at(tl.load(line + f.VECTORS + 2 + side), work) + place, new, mask=mask & steps)
    kept, added = beta1, s * tl.load(group + f.WEIGHT1)
    momentum = tl.maximum(kept * kept * mm + 2.0 * (kept * added) * um + added * added * uu, 0.0)
    momentum = tl.where(mask, momentum, 0.0)
    here = residual_sums + tl.program_id(0)
    whole, momentum, weighted = sum_three(new, momentum, momentum / tl.where(mask, new, 1.0), 0)
    tl.store(here, whole, mask=steps)
    tl.store(here + f.SLICE_MOMENTUM * n_slices, momentum, mask=steps)
    tl.store(here + f.SLICE_WEIGHTED * n_slices, weighted, mask=steps)


@triton.jit
def _encode16(line, number, purpose, work, slice_sums, first_slice, n_slices, place, mask, length, key, lead):
    """Encodes a slice of one of the four vectors as `quantization.Log16` does; the first slice writes the scale."""
    value = tl.load(vector_at(tl.load(line + f.VECTORS + number), work) + place, mask=mask, other=0.0)
    mean = sum_of(slice_sums + first_slice, n_slices, 64) / length.to(tl.float32)
    longer = tl.zeros((), tl.int32)
    reach = tl.full((), 65536, tl.int64)
    while reach < length:
        longer += 1
        reach = reach * 2
    known = mean > 0
    exponent = exponent_of(tl.where(known, mean, 1.0)) + longer
    scale = tl.where(known, power_of_two(exponent), 0.0)
    z = value * power_of_two(-exponent)
    octave = exponent_of(z)
    mantissa = z * power_of_two(tl.maximum(-octave, -126))
    level = tl.log2(tl.where(z > 0, mantissa, 1.0)) * 1365.0
    below = tl.floor(level)
    part = level - below
    step: tl.constexpr = LN2 / 1365.0
    x = part * step
    chance = x * (1.0 + x * 0.5 * (1.0 + x * (1.0 / 3))) / (step * (1.0 + step * 0.5 * (1.0 + step / 3)))
    chance = tl.where(part < ALMOST, 0.0, tl.where(part > 1 - ALMOST, 1.0, chance))
    draw = (mix(place.to(tl.uint32) * 0x9E3779B1 + mix(key ^ purpose)) >> 8).to(tl.float32) * (2.0**-24)
    level = below + (draw < chance).to(tl.float32)
    code = (octave + OCTAVES_BELOW) * CODES_PER_OCTAVE + level.to(tl.int32)
    code = tl.minimum(tl.maximum(code, 0), HIGHEST) + 1
    code = tl.where(mean > 0, tl.where(value > 0, code, 0), 0)
    tl.store(tl.load(line + f.CODES + number).to(tl.pointer_type(tl.int16)) + place, code.to(tl.int16), mask=mask)
    if lead:
        tl.store(tl.load(line + f.CODE_SCALES + number).to(tl.pointer_type(tl.float32)), scale)


@triton.jit
def encode_vectors(
    slices, table, grads, slice_sums, residual_sums, work, finite,
    ROW: tl.constexpr, COL: tl.constexpr, RES_ROW: tl.constexpr, RES_COL: tl.constexpr, VS: tl.constexpr,
):  # fmt: skip
    """Last: the new averages in codes of 16 bits, where a tensor stores them so."""
    tensor, line, side, first, length, other, count, part = _slice_of(slices, table)
    if (tl.load(grads + tensor) == 0) | (tl.load(finite) == 0):
        return
    if tl.load(line + f.CODES + side) == 0:
        return
    place = first + tl.arange(0, VS)
    mask = place < length
    step = tl.load(tl.load(line + f.STEP).to(tl.pointer_type(tl.float32))) + 1.0
    key = step_key(tl.load(line + f.SEED), tl.load(line + f.KEY), step)
    first_slice = tl.load(line + f.FIRST_SLICE)
    n_slices = tl.load(line + f.ROW_SLICES)
    square = tl.full((), ROW, tl.uint32)
    residual = tl.full((), RES_ROW, tl.uint32)
    if side == 1:
        first_slice += n_slices
        n_slices = tl.load(line + f.COL_SLICES)
        square = tl.full((), COL, tl.uint32)
        residual = tl.full((), RES_COL, tl.uint32)
    lead = first == 0
    _encode16(line, side, square, work, slice_sums, first_slice, n_slices, place, mask, length, key, lead)
    _encode16(line, 2 + side, residual, work, residual_sums, first_slice, n_slices, place, mask, length, key, lead)
