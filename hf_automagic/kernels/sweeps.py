# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
# the types of triton.jit functions are of the compiler that runs them, not of Python
"""The sweeps over all matrices that measure: squares, residuals, and, for the cautious mask alone, what agrees.

Each program owns a tile and walks down its rows. What crosses tiles is written to `parts` (rows and columns) and to
`sums` (one number for each tile), added up by a later launch in a fixed order: never by atomics, so that two runs give
the same bits.
"""

import triton
import triton.language as tl

from . import fields as f
from .arithmetic import (
    LARGEST_GRADIENT,
    load_momentum,
    product,
    sum_three,
)
from .tiles import STAGES, bound, column_factor, find_tile, row_factor, typed, vector_at

LOG_RATIO = tl.constexpr(0.036119373230094835)  # of the element mask, 4 ln 10 / 255
CENTRE = tl.constexpr(128.0)


@triton.jit
def sum_squares(
    tiles, table, grads, parts, sums, control,
    DTYPE: tl.constexpr, BR: tl.constexpr, NB: tl.constexpr, BK: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Sweep 1: sums of g^2 over rows and columns; notes the first tensor with a gradient that is not finite."""
    tensor, line, place, first, last, row_tile, col_tile, cols, block, col, exists = find_tile(
        tiles, table, NB, BK, EXACT, False
    )
    address = tl.load(grads + tensor)
    if address == 0:
        tl.store(sums + tl.load(line + f.FIRST_TILE) + place, 0.0)
        return
    grad = typed(address, DTYPE, EXACT)
    row_sums = parts + tl.load(line + f.ROW_PARTS) + col_tile * tl.load(line + f.ROWS)
    squared = tl.zeros([BR, NB, BK], tl.float32)  # summed over rows once, in the end: threads exchange little
    for start in tl.range(bound(first), bound(last), BR, num_stages=STAGES):
        row = start + tl.arange(0, BR)
        mask = (row < last)[:, None, None] & exists[None, :, :]
        g = tl.load(grad + row[:, None, None] * cols + col[None, :, :], mask=mask, other=0.0).to(tl.float32)
        squares = product(g, g, EXACT)
        squared += squares
        tl.store(row_sums + row, tl.sum(tl.sum(squares, 2), 1), mask=row < last)
    total = tl.sum(squared, 0)
    tl.store(parts + tl.load(line + f.COL_PARTS) + row_tile * cols + col, total, mask=exists)
    whole = tl.sum(tl.sum(total, 1), 0)
    tl.store(sums + tl.load(line + f.FIRST_TILE) + place, whole)
    if not (whole <= LARGEST_GRADIENT * LARGEST_GRADIENT):  # many large elements, or really a bad one
        bad = tl.zeros([BR, NB, BK], tl.float32)
        for start in tl.range(bound(first), bound(last), BR):
            row = start + tl.arange(0, BR)
            mask = (row < last)[:, None, None] & exists[None, :, :]
            g = tl.load(grad + row[:, None, None] * cols + col[None, :, :], mask=mask, other=0.0).to(tl.float32)
            bad = tl.where(tl.abs(g) <= LARGEST_GRADIENT, bad, 1.0)
        if tl.sum(tl.sum(tl.sum(bad, 2), 1), 0) > 0:
            tl.atomic_min(control + f.OFFENDER, tl.load(line + f.KEY))


@triton.jit
def voted(offsets, g, m, alive, clear, limit):
    """The element mask after this step's votes: up where a clear momentum and the gradient agree."""
    agreed = tl.where(g > 0, 1.0, tl.where(g < 0, -1.0, 0.0)) * tl.where(m > 0, 1.0, tl.where(m < 0, -1.0, 0.0))
    vote = tl.where(alive > 0, tl.where(tl.abs(m) > clear, agreed, 0.0), 0.0)
    return tl.minimum(tl.maximum(offsets + vote, -limit), limit)


@triton.jit
def sum_residuals(
    tiles, table, grads, groups, parts, plane, sums, n_tiles, slice_sums, work, finite, clip,
    DTYPE: tl.constexpr, BR: tl.constexpr, NB: tl.constexpr, BK: tl.constexpr, EXACT: tl.constexpr,
    KIND: tl.constexpr, ELEMENTS: tl.constexpr, MEASURES: tl.constexpr,
):  # fmt: skip
    """Sweep 2: sums of u^2, u m and m^2 over rows and columns, u the update before its clip.

    The sums of the residual (u - m')^2, m' the new momentum, follow from them whatever the clip turns out to be.
    """
    tensor, line, place, first, last, row_tile, col_tile, cols, block, col, exists = find_tile(
        tiles, table, NB, BK, EXACT, True
    )
    address = tl.load(grads + tensor)
    if (address == 0) | (tl.load(finite) == 0):
        return
    grad = typed(address, DTYPE, EXACT)
    group = groups + tl.load(line + f.GROUP) * f.GROUP_WIDTH
    rows, blocks = tl.load(line + f.ROWS), tl.load(line + f.BLOCKS)
    codes, scale, zero = tl.load(line + f.MOMENTUM), tl.load(line + f.SCALE), tl.load(line + f.ZERO)
    step = tl.load(tl.load(line + f.STEP).to(tl.pointer_type(tl.float32))) + 1.0
    whole, by_col, divisor = column_factor(line, work, slice_sums, group, step, col, exists)
    whole = whole * tl.load(clip)
    by_col = by_col * whole
    row_sums = parts + tl.load(line + f.ROW_PARTS) + col_tile * rows
    moments = vector_at(tl.load(line + f.VECTORS), work)
    uus = tl.zeros([BR, NB, BK], tl.float32)
    ums = tl.zeros([BR, NB, BK], tl.float32)
    mms = tl.zeros([BR, NB, BK], tl.float32)
    moved = tl.zeros([BR, NB, BK], tl.float32)
    due = False
    if ELEMENTS:
        every = tl.load(group + f.RECENTRE)
        due = step - tl.floor(step / every) * every == 0
    for start in tl.range(bound(first), bound(last), BR, num_stages=STAGES):
        row = start + tl.arange(0, BR)
        here = row < last
        mask = here[:, None, None] & exists[None, :, :]
        offsets = row[:, None, None] * cols + col[None, :, :]
        shared = row[:, None] * blocks + block[None, :]
        shared_mask = here[:, None] & (block < blocks)[None, :]
        g = tl.load(grad + offsets, mask=mask, other=0.0).to(tl.float32)
        m = load_momentum(codes, scale, zero, offsets, shared, mask, shared_mask, KIND, EXACT)
        u = g * row_factor(moments, divisor, row, here)[:, None, None] * by_col[None, :, :]
        a, b, c = product(u, u, EXACT), product(u, m, EXACT), product(m, m, EXACT)
        uus += a
        ums += b
        mms += c
        a, b, c = sum_three(a, b, c, 2)
        a, b, c = sum_three(a, b, c, 1)
        tl.store(row_sums + row, a, mask=here)
        tl.store(row_sums + plane + row, b, mask=here)
        tl.store(row_sums + 2 * plane + row, c, mask=here)
        if ELEMENTS:
            if due:
                elements = tl.load(line + f.MASK).to(tl.pointer_type(tl.uint8))
                k = tl.load(elements + offsets, mask=mask, other=128).to(tl.float32) - CENTRE
                k = voted(k, g, m, whole, tl.load(group + f.CLEAR), tl.load(group + f.LIMIT))
                moved += tl.where(mask, k, 0.0)
    uu, um, mm = tl.sum(uus, 0), tl.sum(ums, 0), tl.sum(mms, 0)
    col_sums = parts + tl.load(line + f.COL_PARTS) + row_tile * cols
    tl.store(col_sums + col, uu, mask=exists)
    tl.store(col_sums + plane + col, um, mask=exists)
    tl.store(col_sums + 2 * plane + col, mm, mask=exists)
    mine = sums + tl.load(line + f.FIRST_TILE) + place
    tl.store(mine + f.SUM_UPDATE * n_tiles, tl.sum(tl.sum(uu, 1), 0))
    if MEASURES:
        tl.store(mine + f.SUM_AGREEMENT * n_tiles, tl.sum(tl.sum(um, 1), 0))
        tl.store(mine + f.SUM_MOMENTUM * n_tiles, tl.sum(tl.sum(mm, 1), 0))
    if ELEMENTS:
        tl.store(mine + f.SUM_OFFSETS * n_tiles, tl.sum(tl.sum(tl.sum(moved, 2), 1), 0))


@triton.jit
def count_agreement(
    tiles, table, grads, groups, stats, sums, n_tiles, slice_sums, work, finite, clip,
    DTYPE: tl.constexpr, BR: tl.constexpr, NB: tl.constexpr, BK: tl.constexpr, EXACT: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """For the cautious mask alone: how many elements of the new momentum agree with the gradient, and have a say."""
    tensor, line, place, first, last, row_tile, col_tile, cols, block, col, exists = find_tile(
        tiles, table, NB, BK, EXACT, False
    )
    address = tl.load(grads + tensor)
    if (address == 0) | (tl.load(finite) == 0):
        return
    grad = typed(address, DTYPE, EXACT)
    group = groups + tl.load(line + f.GROUP) * f.GROUP_WIDTH
    blocks = tl.load(line + f.BLOCKS)
    codes, scale, zero = tl.load(line + f.MOMENTUM), tl.load(line + f.SCALE), tl.load(line + f.ZERO)
    step = tl.load(tl.load(line + f.STEP).to(tl.pointer_type(tl.float32))) + 1.0
    whole, by_col, divisor = column_factor(line, work, slice_sums, group, step, col, exists)
    by_col = by_col * (whole * tl.load(clip) * tl.load(stats + tensor * f.STATS_WIDTH + f.CLIPPED))
    weight = tl.load(group + f.WEIGHT1)
    moments = vector_at(tl.load(line + f.VECTORS), work)
    agreeing = tl.zeros([BR, NB, BK], tl.float32)
    voting = tl.zeros([BR, NB, BK], tl.float32)
    for start in tl.range(bound(first), bound(last), BR, num_stages=STAGES):
        row = start + tl.arange(0, BR)
        here = row < last
        mask = here[:, None, None] & exists[None, :, :]
        offsets = row[:, None, None] * cols + col[None, :, :]
        shared = row[:, None] * blocks + block[None, :]
        shared_mask = here[:, None] & (block < blocks)[None, :]
        g = tl.load(grad + offsets, mask=mask, other=0.0).to(tl.float32)
        m = load_momentum(codes, scale, zero, offsets, shared, mask, shared_mask, KIND, EXACT)
        u = g * row_factor(moments, divisor, row, here)[:, None, None] * by_col[None, :, :]
        m = m + weight * (u - m)
        agreeing += (((m > 0) & (g > 0)) | ((m < 0) & (g < 0))).to(tl.float32)
        voting += ((m != 0) & (g != 0)).to(tl.float32)
    mine = sums + tl.load(line + f.FIRST_TILE) + place
    tl.store(mine + f.SUM_AGREEING * n_tiles, tl.sum(tl.sum(tl.sum(agreeing, 2), 1), 0))
    tl.store(mine + f.SUM_VOTING * n_tiles, tl.sum(tl.sum(tl.sum(voting, 2), 1), 0))
