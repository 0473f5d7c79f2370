# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
# the types of triton.jit functions are of the compiler that runs them, not of Python
"""Where a program works: a tile of a matrix, and the factors that its rows and columns bring."""

import triton
import triton.language as tl

from . import fields as f
from .arithmetic import IS_INTERPRETED, VERSION, one_minus_power, sum_three

TINY_MEAN_SQUARE = tl.constexpr(2.0**-114)
TINY_RATIO = tl.constexpr(2.0**-60)
# of the loops over rows: what the next rows need is loaded while these are computed. Triton 3.2, of torch 2.6, ends
# the process over tiles of three dimensions in shared memory.
STAGES = tl.constexpr(3 if VERSION >= (3, 3) else 1)


@triton.jit
def find_tile(tiles, table, NB: tl.constexpr, BK: tl.constexpr, EXACT: tl.constexpr, BACKWARDS: tl.constexpr):
    """Says which tensor a program works on and where its tile lies; every other sweep starts with what is cached.

    Returns:
        number of the tensor, its line of the table, place of the tile among the tensor's, its first row and the row
        after its last, the place of its column blocks, columns of a row, columns at hand [NB, BK], which exist.
    """
    pid = tl.program_id(0)
    if BACKWARDS:
        pid = tl.num_programs(0) - 1 - pid
    tensor = tl.load(tiles + 2 * pid)
    place = tl.load(tiles + 2 * pid + 1)
    line = table + tensor.to(tl.int64) * f.WIDTH
    rows, blocks = tl.load(line + f.ROWS), tl.load(line + f.BLOCKS)
    col_tiles, height = tl.load(line + f.COL_TILES).to(tl.int32), tl.load(line + f.TILE_ROWS)
    row_tile, col_tile = place // col_tiles, place % col_tiles
    first = row_tile * height
    last = tl.minimum(first + height, rows)
    block = col_tile * NB + tl.arange(0, NB)
    inside = tl.arange(0, BK)
    if EXACT:
        cols = blocks * BK
        col = block[:, None] * BK + inside[None, :]
        exists = (block < blocks)[:, None] & (inside >= 0)[None, :]
    else:
        cols = tl.load(line + f.COLS)
        width = tl.load(line + f.BLOCK)
        col = block[:, None] * width + inside[None, :]
        exists = (block < blocks)[:, None] & (inside < width)[None, :] & (col < cols)
    return tensor, line, place, first, last, row_tile, col_tile, cols, block, col, exists


@triton.jit
def bound(x):
    """Returns a number as a loop takes it; the interpreter's own is an array of one, which recent NumPy refuses."""
    if IS_INTERPRETED:
        return x.handle.data.item()
    else:
        return x


@triton.jit
def typed(address, DTYPE: tl.constexpr, EXACT: tl.constexpr):
    """Turns an address into a pointer, aligned where the tile is exact."""
    pointer = address.to(tl.pointer_type(DTYPE))
    if EXACT:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def vector_at(address, work):
    """Returns the float32 vector that an address of the table means; below zero it lies in `work`."""
    kept = address.to(tl.pointer_type(tl.float32))
    if address < 0:
        kept = work - (address + 1)
    return kept


@triton.jit
def sum_of(values, count, SIZE: tl.constexpr):
    """Adds up the first `count` numbers, always in the same order."""
    place = tl.arange(0, SIZE)
    total = tl.zeros([SIZE], tl.float32)
    start = tl.zeros((), tl.int64)
    while start < count:
        total += tl.load(values + start + place, mask=start + place < count, other=0.0)
        start += SIZE
    return tl.sum(total, 0)


@triton.jit
def sum_planes(values, plane, count, SIZE: tl.constexpr):
    """Adds up the first `count` numbers of three planes, in one exchange between threads."""
    place = tl.arange(0, SIZE)
    one = tl.zeros([SIZE], tl.float32)
    two = tl.zeros([SIZE], tl.float32)
    three = tl.zeros([SIZE], tl.float32)
    start = tl.zeros((), tl.int64)
    while start < count:
        mask = start + place < count
        some = values + start + place
        one += tl.load(some, mask=mask, other=0.0)
        two += tl.load(some + plane, mask=mask, other=0.0)
        three += tl.load(some + 2 * plane, mask=mask, other=0.0)
        start += SIZE
    return sum_three(one, two, three, 0)


@triton.jit
def column_factor(line, work, slice_sums, group, step, col, exists):
    """Returns 1 / sqrt of the second moment's mean and of its columns' ratios to the mean [NB, BK], and the mean."""
    first = slice_sums + tl.load(line + f.FIRST_SLICE)
    mean = sum_of(first, tl.load(line + f.ROW_SLICES), 64) / tl.load(line + f.ROWS).to(tl.float32)
    unbiased = mean / one_minus_power(tl.load(group + f.LOG2), step)
    alive = unbiased >= TINY_MEAN_SQUARE
    whole = tl.where(alive, 1.0 / tl.sqrt(tl.where(alive, unbiased, 1.0)), 0.0)
    divisor = tl.where(mean > 0, mean, 1.0)
    moment = tl.load(vector_at(tl.load(line + f.VECTORS + 1), work) + col, mask=exists, other=0.0)
    return whole, tl.rsqrt(tl.maximum(moment / divisor, TINY_RATIO)), divisor


@triton.jit
def row_factor(moments, divisor, row, mask):
    """Returns 1 / sqrt of the ratios of the rows' second moments to the mean [BR]."""
    moment = tl.load(moments + row, mask=mask, other=0.0)
    return tl.rsqrt(tl.maximum(moment / divisor, TINY_RATIO))
