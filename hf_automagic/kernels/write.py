# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
# the types of triton.jit functions are of the compiler that runs them, not of Python
"""The last sweep: momenta, element rates and weights are written."""

import triton
import triton.language as tl

from . import fields as f
from .arithmetic import (
    load_momentum,
    one_minus_power,
    random_halves,
    round_even,
    round_randomly,
    step_key,
    store_momentum,
)
from .sweeps import CENTRE, LOG_RATIO, voted
from .tiles import STAGES, bound, column_factor, find_tile, row_factor, sum_of, sum_planes, typed, vector_at


@triton.jit
def shrink_and_store(
    param,
    offsets,
    mask,
    update,
    lr,
    decay,
    key,
    DTYPE: tl.constexpr,
    ROUND: tl.constexpr,
    CAUTIOUS_DECAY: tl.constexpr,
    PAIRED: tl.constexpr,
):
    """Subtracts the update and the decay from the weights, rounded as their dtype needs; returns its square."""
    p = tl.load(param + offsets, mask=mask, other=0.0).to(tl.float32)
    if decay > 0:
        lost = p * (lr * decay)
        if CAUTIOUS_DECAY:
            lost = tl.where(((update > 0) & (p < 0)) | ((update < 0) & (p > 0)), 0.0, lost)
        update = update + lost
    p = p - update
    if ROUND:
        p = round_randomly(p, random_halves(key, offsets, PAIRED), DTYPE)
    tl.store(param + offsets, p.to(DTYPE), mask=mask)
    return update * update


@triton.jit
def confidence(line, work, residual_sums, n_slices, group, step, col, exists):
    """Returns what the confidence brings to a step.

    Returns:
        1 / sqrt of the columns' unbiased residuals [NB, BK], the mean of the rows', and the RMS of the direction as
        `transforms.Confidence` estimates it, without the momentum's correction.
    """
    first = residual_sums + tl.load(line + f.FIRST_SLICE)
    slices = tl.load(line + f.ROW_SLICES)
    moment = tl.load(vector_at(tl.load(line + f.VECTORS + 3), work) + col, mask=exists, other=1.0)
    by_col = sum_of(first + f.SLICE_WEIGHTED * n_slices + slices, tl.load(line + f.COL_SLICES), 64)
    mean, total, by_row = sum_planes(first, n_slices, slices, 64)
    rows = tl.load(line + f.ROWS).to(tl.float32)
    mean = mean / rows
    unbiased = one_minus_power(tl.load(group + f.LOG3), step)
    weighted = (by_row * mean) * (by_col * unbiased)
    length = tl.sqrt(weighted / tl.where(total > 0, total, 1.0) / (rows * tl.load(line + f.COLS).to(tl.float32)))
    return tl.rsqrt(moment / unbiased), mean, length


@triton.jit
def write_steps(
    tiles, table, grads, gains, groups, rates, stats, sums, n_tiles, slice_sums, residual_sums, n_slices,
    work, finite, clip,
    DTYPE: tl.constexpr, BR: tl.constexpr, NB: tl.constexpr, BK: tl.constexpr, EXACT: tl.constexpr,
    KIND: tl.constexpr, ELEMENTS: tl.constexpr, CAUTIOUS: tl.constexpr, GAINS: tl.constexpr, ROUND: tl.constexpr,
    CAUTIOUS_DECAY: tl.constexpr, PAIRED: tl.constexpr,
):  # fmt: skip
    """Sweep 3: the new momentum in its codes, the element rates, the step."""
    tensor, line, place, first, last, row_tile, col_tile, cols, block, col, exists = find_tile(
        tiles, table, NB, BK, EXACT, False
    )
    mine = sums + tl.load(line + f.FIRST_TILE)
    address = tl.load(grads + tensor)
    if (address == 0) | (tl.load(finite) == 0):
        tl.store(mine + f.SUM_CHANGE * n_tiles + place, 0.0)
        return
    grad = typed(address, DTYPE, EXACT)
    param = typed(tl.load(line + f.PARAM), DTYPE, EXACT)
    group = groups + tl.load(line + f.GROUP) * f.GROUP_WIDTH
    rows, blocks = tl.load(line + f.ROWS), tl.load(line + f.BLOCKS)
    codes, scale, zero = tl.load(line + f.MOMENTUM), tl.load(line + f.SCALE), tl.load(line + f.ZERO)
    step = tl.load(tl.load(line + f.STEP).to(tl.pointer_type(tl.float32))) + 1.0
    key = step_key(tl.load(line + f.SEED), tl.load(line + f.KEY), step)
    lr = tl.load(rates + tl.load(line + f.GROUP) * f.RATES_WIDTH + f.APPLIED_LR)
    decay = tl.load(group + f.DECAY)
    whole, by_col, divisor = column_factor(line, work, slice_sums, group, step, col, exists)
    by_col = by_col * (whole * tl.load(clip) * tl.load(stats + tensor * f.STATS_WIDTH + f.CLIPPED))
    calm, mean, length = confidence(line, work, residual_sums, n_slices, group, step, col, exists)
    reach = lr / tl.maximum(length, one_minus_power(tl.load(group + f.LOG1), step))
    count = tl.load(line + f.COL_TILES) * tl.load(line + f.ROW_TILES)
    if CAUTIOUS:
        agreeing = sum_of(mine + f.SUM_AGREEING * n_tiles, count, 256)
        voting = sum_of(mine + f.SUM_VOTING * n_tiles, count, 256)
        reach = reach / tl.maximum(agreeing / tl.maximum(voting, 1.0), 0.5)
    centre = 0.0
    if ELEMENTS:
        every = tl.load(group + f.RECENTRE)
        if step - tl.floor(step / every) * every == 0:
            numel = rows.to(tl.float32) * cols.to(tl.float32)
            centre = round_even(sum_of(mine + f.SUM_OFFSETS * n_tiles, count, 256) / numel)
    calm = calm * reach
    weight = tl.load(group + f.WEIGHT1)
    moments = vector_at(tl.load(line + f.VECTORS), work)
    residuals = vector_at(tl.load(line + f.VECTORS + 2), work)
    changes = tl.zeros([BR, NB, BK], tl.float32)
    for start in tl.range(bound(first), bound(last), BR, num_stages=STAGES):
        row = start + tl.arange(0, BR)
        here = row < last
        mask = here[:, None, None] & exists[None, :, :]
        offsets = row[:, None, None] * cols + col[None, :, :]
        shared = row[:, None] * blocks + block[None, :]
        shared_mask = here[:, None] & (block < blocks)[None, :]
        g = tl.load(grad + offsets, mask=mask, other=0.0).to(tl.float32)
        m = load_momentum(codes, scale, zero, offsets, shared, mask, shared_mask, KIND, EXACT)
        residual = tl.load(residuals + row, mask=here, other=1.0)
        by_row = tl.rsqrt(residual / mean)
        if GAINS:
            gain = tl.load(gains + 2 * tensor)
            if gain != 0:
                stride = tl.load(gains + 2 * tensor + 1)
                by_row = by_row * tl.load(gain.to(tl.pointer_type(tl.float32)) + row * stride, mask=here, other=1.0)
        u = g * row_factor(moments, divisor, row, here)[:, None, None] * by_col[None, :, :]
        new = m + weight * (u - m)
        update = new * by_row[:, None, None] * calm[None, :, :]
        if CAUTIOUS:
            update = tl.where(((new > 0) & (g > 0)) | ((new < 0) & (g < 0)), update, 0.0)
        if ELEMENTS:
            elements = typed(tl.load(line + f.MASK), tl.uint8, EXACT)
            k = tl.load(elements + offsets, mask=mask, other=128).to(tl.float32) - CENTRE
            limit = tl.load(group + f.LIMIT)
            k = voted(k, g, m, whole, tl.load(group + f.CLEAR), limit) - centre
            k = tl.minimum(tl.maximum(k, -limit), limit)
            tl.store(elements + offsets, (k + CENTRE).to(tl.uint8), mask=mask)
            update = update * tl.exp(k * LOG_RATIO)
        store_momentum(new, codes, scale, zero, offsets, shared, mask, shared_mask, KIND, EXACT)
        changes += shrink_and_store(param, offsets, mask, update, lr, decay, key, DTYPE, ROUND, CAUTIOUS_DECAY, PAIRED)
    tl.store(mine + f.SUM_CHANGE * n_tiles + place, tl.sum(tl.sum(tl.sum(changes, 2), 1), 0))
