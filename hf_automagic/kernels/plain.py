# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
# the types of triton.jit functions are of the compiler that runs them, not of Python
"""Parameters without rows to share, biases and norms: one program steps a whole one, with a full second moment."""

import triton
import triton.language as tl

from . import fields as f
from .arithmetic import LARGEST_GRADIENT, one_minus_power, round_even, step_key
from .sweeps import CENTRE, LOG_RATIO, voted
from .tiles import TINY_MEAN_SQUARE
from .write import shrink_and_store


@triton.jit
def check_plain(tensors, table, grads, sums, control, DTYPE: tl.constexpr, SIZE: tl.constexpr):
    """Sums g^2, and notes a gradient that is not finite; the counterpart of sweep 1."""
    tensor = tl.load(tensors + tl.program_id(0))
    line = table + tensor.to(tl.int64) * f.WIDTH
    address = tl.load(grads + tensor)
    if address == 0:
        tl.store(sums + tl.load(line + f.FIRST_TILE), 0.0)
        return
    grad = address.to(tl.pointer_type(DTYPE))
    numel = tl.load(line + f.ROWS) * tl.load(line + f.COLS)
    total = tl.zeros([SIZE], tl.float32)
    bad = tl.zeros([SIZE], tl.float32)
    start = tl.zeros((), tl.int64)
    while start < numel:
        place = start + tl.arange(0, SIZE)
        g = tl.load(grad + place, mask=place < numel, other=0.0).to(tl.float32)
        total += g * g
        bad = tl.where(tl.abs(g) <= LARGEST_GRADIENT, bad, 1.0)
        start += SIZE
    tl.store(sums + tl.load(line + f.FIRST_TILE), tl.sum(total, 0))
    if tl.sum(bad, 0) > 0:
        tl.atomic_min(control + f.OFFENDER, tl.load(line + f.KEY))


@triton.jit
def _normalised(grad, moments, place, mask, clip, weight2, correction):
    """Returns the gradient, u before its clip, the new second moment, and which elements have seen a gradient."""
    g = tl.load(grad + place, mask=mask, other=0.0).to(tl.float32) * clip
    old = tl.load(moments + place, mask=mask, other=0.0)
    moment = old + weight2 * (g * g - old)
    unbiased = moment / correction
    alive = unbiased >= TINY_MEAN_SQUARE
    return g, tl.where(alive, g / tl.sqrt(tl.where(alive, unbiased, 1.0)), 0.0), moment, alive


@triton.jit
def step_plain(
    tensors, table, grads, groups, rates, stats, sums, n_tiles, finite, clip,
    DTYPE: tl.constexpr, SIZE: tl.constexpr, ELEMENTS: tl.constexpr, CAUTIOUS: tl.constexpr, ROUND: tl.constexpr,
    CAUTIOUS_DECAY: tl.constexpr,
):  # fmt: skip
    """Steps one parameter: three passes over elements that stay in the cache."""
    tensor = tl.load(tensors + tl.program_id(0))
    line = table + tensor.to(tl.int64) * f.WIDTH
    change = sums + f.SUM_CHANGE * n_tiles + tl.load(line + f.FIRST_TILE)
    address = tl.load(grads + tensor)
    if (address == 0) | (tl.load(finite) == 0):
        tl.store(change, 0.0)
        return
    grad, param = address.to(tl.pointer_type(DTYPE)), tl.load(line + f.PARAM).to(tl.pointer_type(DTYPE))
    moments = tl.load(line + f.MOMENT).to(tl.pointer_type(tl.float32))
    momenta = tl.load(line + f.MOMENTUM).to(tl.pointer_type(tl.float32))
    elements = tl.load(line + f.MASK).to(tl.pointer_type(tl.uint8))
    group = groups + tl.load(line + f.GROUP) * f.GROUP_WIDTH
    lr = tl.load(rates + tl.load(line + f.GROUP) * f.RATES_WIDTH + f.APPLIED_LR)
    numel = tl.load(line + f.ROWS) * tl.load(line + f.COLS)
    step = tl.load(tl.load(line + f.STEP).to(tl.pointer_type(tl.float32))) + 1.0
    key = step_key(tl.load(line + f.SEED), tl.load(line + f.KEY), step)
    factor, weight1, weight2 = tl.load(clip), tl.load(group + f.WEIGHT1), tl.load(group + f.WEIGHT2)
    correction = one_minus_power(tl.load(group + f.LOG2), step)
    clear, limit = tl.load(group + f.CLEAR), tl.load(group + f.LIMIT)
    uu = tl.zeros([SIZE], tl.float32)
    um = tl.zeros([SIZE], tl.float32)
    mm = tl.zeros([SIZE], tl.float32)
    moved = tl.zeros([SIZE], tl.float32)
    start = tl.zeros((), tl.int64)
    while start < numel:
        place = start + tl.arange(0, SIZE)
        mask = place < numel
        g, u, moment, alive = _normalised(grad, moments, place, mask, factor, weight2, correction)
        m = tl.load(momenta + place, mask=mask, other=0.0)
        uu += u * u
        um += u * m
        mm += m * m
        if ELEMENTS:
            k = tl.load(elements + place, mask=mask, other=128).to(tl.float32) - CENTRE
            moved += tl.where(mask, voted(k, g, m, alive.to(tl.float32), clear, limit), 0.0)
        start += SIZE
    total = tl.sum(uu, 0)
    s = 1.0 / tl.maximum(tl.sqrt(total / numel.to(tl.float32)) / tl.load(group + f.CLIP), 1.0)
    out = stats + tensor * f.STATS_WIDTH
    tl.store(out + f.AGREEMENT, s * tl.sum(um, 0))
    tl.store(out + f.UPDATE, s * s * total)
    tl.store(out + f.SQUARE, tl.sum(mm, 0))
    reach = lr / one_minus_power(tl.load(group + f.LOG1), step)
    if CAUTIOUS:
        agreeing = tl.zeros([SIZE], tl.float32)
        voting = tl.zeros([SIZE], tl.float32)
        start = tl.zeros((), tl.int64)
        while start < numel:
            place = start + tl.arange(0, SIZE)
            mask = place < numel
            g, u, moment, alive = _normalised(grad, moments, place, mask, factor, weight2, correction)
            m = tl.load(momenta + place, mask=mask, other=0.0)
            m = m + weight1 * (s * u - m)
            agreeing += (((m > 0) & (g > 0)) | ((m < 0) & (g < 0))).to(tl.float32)
            voting += ((m != 0) & (g != 0)).to(tl.float32)
            start += SIZE
        reach = reach / tl.maximum(tl.sum(agreeing, 0) / tl.maximum(tl.sum(voting, 0), 1.0), 0.5)
    centre = 0.0
    if ELEMENTS:
        every = tl.load(group + f.RECENTRE)
        if step - tl.floor(step / every) * every == 0:
            centre = round_even(tl.sum(moved, 0) / numel.to(tl.float32))
    decay = tl.load(group + f.DECAY)
    changes = tl.zeros([SIZE], tl.float32)
    start = tl.zeros((), tl.int64)
    while start < numel:
        place = start + tl.arange(0, SIZE)
        mask = place < numel
        g, u, moment, alive = _normalised(grad, moments, place, mask, factor, weight2, correction)
        m = tl.load(momenta + place, mask=mask, other=0.0)
        new = m + weight1 * (s * u - m)
        update = new * reach
        if CAUTIOUS:
            update = tl.where(((new > 0) & (g > 0)) | ((new < 0) & (g < 0)), update, 0.0)
        if ELEMENTS:
            k = tl.load(elements + place, mask=mask, other=128).to(tl.float32) - CENTRE
            k = voted(k, g, m, alive.to(tl.float32), clear, limit) - centre
            k = tl.minimum(tl.maximum(k, -limit), limit)
            tl.store(elements + place, (k + CENTRE).to(tl.uint8), mask=mask)
            update = update * tl.exp(k * LOG_RATIO)
        tl.store(moments + place, moment, mask=mask)
        tl.store(momenta + place, new, mask=mask)
        changes += shrink_and_store(param, place, mask, update, lr, decay, key, DTYPE, ROUND, CAUTIOUS_DECAY, False)
        start += SIZE
    tl.store(change, tl.sum(changes, 0))
