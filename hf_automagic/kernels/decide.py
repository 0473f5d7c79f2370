"""Two launches of a program or two: what a step may do, before anything is written, and what it leaves to the next."""

import triton
import triton.language as tl

from . import fields as f
from .tiles import sum_of


@triton.jit
def decide(
    control, finite, clip, groups, rates, sums, n_tiles, n_groups, multiplier, outside, outside_square, max_norm,
    HAS_NORM: tl.constexpr,
):  # fmt: skip
    """Decides whether the step is applied, the factor that clips the gradients, and each group's rate."""
    offender = tl.load(control + f.OFFENDER)
    other = tl.load(outside)
    offender = tl.minimum(offender, tl.where(other < 0, f.NOBODY, other))
    tl.store(control + f.FOUND, offender)
    tl.store(control + f.OFFENDER, f.NOBODY)
    tl.store(finite, (offender == f.NOBODY).to(tl.uint8))
    if HAS_NORM:
        square = sum_of(sums + f.SUM_GRAD * n_tiles, n_tiles, 1024) + tl.load(outside_square)
        tl.store(clip, tl.minimum(max_norm / (tl.sqrt(square) + 1e-6), 1.0))
    applied = tl.load(control + f.APPLIED).to(tl.float32)
    i = tl.zeros((), tl.int32)
    while i < n_groups:
        group, rate = groups + i * f.GROUP_WIDTH, rates + i * f.RATES_WIDTH
        lr = tl.load(group + f.LR)
        m = tl.where(tl.load(group + f.IN_CONTEXT) > 0, tl.load(multiplier), 1.0)
        rail = tl.load(group + f.MAX_LR) / tl.maximum(m, 1.0)
        searched = tl.load(group + f.INITIAL_LR) * tl.exp(tl.load(rate + f.LOG_RATE))
        searched = tl.minimum(tl.maximum(searched, tl.load(group + f.MIN_LR)), rail)
        tuned = tl.load(group + f.SCHEDULE) * tl.where(tl.load(group + f.SEARCHES) > 0, searched, rail)
        rail_steps = tl.load(group + f.RAIL_STEPS)
        tuned = tl.where(rail_steps > 0, tuned * tl.minimum(tl.sqrt(rail_steps / (applied + 1.0)), 1.0), tuned)
        base = tl.where(tl.load(group + f.IS_TUNED) > 0, tuned, lr)
        warmup = tl.load(group + f.WARMUP)
        base = tl.where(warmup > 0, base * tl.minimum((applied + 1.0) / tl.maximum(warmup, 1.0), 1.0), base)
        tl.store(rate + f.BASE_LR, base)
        tl.store(rate + f.APPLIED_LR, base * m)
        i += 1


@triton.jit
def _group_sums(table, grads, stats, pools, n_tensors, i, SIZE: tl.constexpr):
    """Adds up what the tensors of group i measured, and the sums of its parameters outside the kernels."""
    place = tl.arange(0, SIZE)
    agreement = tl.zeros([SIZE], tl.float32)
    update = tl.zeros([SIZE], tl.float32)
    square = tl.zeros([SIZE], tl.float32)
    start = tl.zeros((), tl.int32)
    while start < n_tensors:
        tensor = start + place
        is_there = tensor < n_tensors
        stepped = is_there & (tl.load(grads + tensor, mask=is_there, other=0) != 0)
        mine = stepped & (tl.load(table + tensor.to(tl.int64) * f.WIDTH + f.GROUP, mask=is_there, other=-1) == i)
        seen = stats + tensor * f.STATS_WIDTH
        agreement += tl.load(seen + f.AGREEMENT, mask=mine, other=0.0)
        update += tl.load(seen + f.UPDATE, mask=mine, other=0.0)
        square += tl.load(seen + f.SQUARE, mask=mine, other=0.0)
        start += SIZE
    own = pools + i * f.POOL_WIDTH
    return (
        tl.sum(agreement, 0) + tl.load(own),
        tl.sum(update, 0) + tl.load(own + 1),
        tl.sum(square, 0) + tl.load(own + 2),
    )


@triton.jit
def _retune(group, rate, agreement, update, square):
    """Moves a group's log rate, `self_tuning.log_rate_step`."""
    norm = tl.sqrt(update) * tl.sqrt(square)
    cosine = tl.where(norm > 0, agreement / tl.where(norm > 0, norm, 1.0), 0.0)
    cosine = tl.minimum(tl.maximum(cosine, -1.0), 1.0)
    vote = tl.minimum(tl.maximum(cosine * tl.load(group + f.VOTE_SCALE), -1.0), 1.0)
    change = tl.where(update > 0, tl.load(group + f.SPEED) * (vote + tl.load(group + f.DRIFT)), 0.0)
    moved = tl.load(rate + f.LOG_RATE) + change
    moved = tl.minimum(tl.maximum(moved, tl.load(group + f.LOWEST)), tl.load(group + f.HIGHEST))
    if tl.load(group + f.HAS_POOL) > 0:
        tl.store(rate + f.LOG_RATE, moved)


@triton.jit
def _record(control, events, capacity, applied, skipped, run, offender):
    """Records that a step was skipped, for the first and for the tenth in a row; `optim.events.record_events`."""
    if (run == 1) | (run == 10):
        place = tl.arange(0, 256)
        moved = tl.load(events + place + 4, mask=place < capacity - 4, other=0.0)
        tl.debug_barrier()
        tl.store(events + place, moved, mask=place < capacity - 4)
        newest = events + capacity - 4
        tl.store(newest, (applied + skipped).to(tl.float32))
        tl.store(newest + 1, tl.where(run == 10, 3.0, 2.0))
        tl.store(newest + 2, offender.to(tl.float32))
        tl.store(newest + 3, run.to(tl.float32))
        tl.store(control + f.RECORDED, tl.load(control + f.RECORDED) + 1)


@triton.jit
def _tune(
    table, grads, groups, rates, stats, sums, n_tiles, ranges, pools, totals, is_finite, n_tensors, n_groups,
    SIZE: tl.constexpr, MEASURES: tl.constexpr, GLOBAL: tl.constexpr,
):  # fmt: skip
    """Measures the step's length, tunes the rates of the next one, gives the context its sums."""
    if is_finite:
        i = tl.zeros((), tl.int32)
        while i < n_groups:
            first = tl.load(ranges + 2 * i)
            changes = sum_of(sums + f.SUM_CHANGE * n_tiles + first, tl.load(ranges + 2 * i + 1) - first, SIZE)
            changes += tl.load(pools + i * f.POOL_WIDTH + f.CHANGE)
            numel = tl.load(groups + i * f.GROUP_WIDTH + f.NUMEL)
            if numel > 0:
                tl.store(rates + i * f.RATES_WIDTH + f.UPDATE_RMS, tl.sqrt(changes / numel))
            i += 1
    if MEASURES:
        agreement = tl.zeros((), tl.float32)
        update = tl.zeros((), tl.float32)
        square = tl.zeros((), tl.float32)
        i = tl.zeros((), tl.int32)
        while i < n_groups:
            a, u, m = _group_sums(table, grads, stats, pools, n_tensors, i, SIZE)
            tl.store(totals + 3 * i, a)
            tl.store(totals + 3 * i + 1, u)
            tl.store(totals + 3 * i + 2, m)
            searches = tl.load(groups + i * f.GROUP_WIDTH + f.SEARCHES) > 0
            agreement += tl.where(searches, a, 0.0)
            update += tl.where(searches, u, 0.0)
            square += tl.where(searches, m, 0.0)
            if not GLOBAL:
                if is_finite:
                    _retune(groups + i * f.GROUP_WIDTH, rates + i * f.RATES_WIDTH, a, u, m)
            i += 1
        if GLOBAL:
            i = tl.zeros((), tl.int32)
            while i < n_groups:
                if is_finite:
                    _retune(groups + i * f.GROUP_WIDTH, rates + i * f.RATES_WIDTH, agreement, update, square)
                i += 1


@triton.jit
def _count(
    table, grads, control, is_finite, events, n_tensors, SIZE: tl.constexpr, RECORD: tl.constexpr,
    CAPACITY: tl.constexpr,
):  # fmt: skip
    """Counts the step, in the tensors that took it and for all of them."""
    start = tl.zeros((), tl.int32)
    while start < n_tensors:
        tensor = start + tl.arange(0, SIZE)
        is_there = tensor < n_tensors
        stepped = is_there & (tl.load(grads + tensor, mask=is_there, other=0) != 0) & is_finite
        step = tl.load(table + tensor.to(tl.int64) * f.WIDTH + f.STEP, mask=stepped, other=0)
        step = step.to(tl.pointer_type(tl.float32))
        tl.store(step, tl.load(step, mask=stepped, other=0.0) + 1.0, mask=stepped)
        start += SIZE
    offender = tl.load(control + f.FOUND)
    one = is_finite.to(tl.int64)
    applied, skipped = tl.load(control + f.APPLIED) + one, tl.load(control + f.SKIPPED) + 1 - one
    run = tl.where(is_finite, 0, tl.load(control + f.CONSECUTIVE) + 1)
    latest = tl.where(is_finite, tl.load(control + f.LAST_OFFENDER), offender)
    tl.debug_barrier()
    tl.store(control + f.APPLIED, applied)
    tl.store(control + f.SKIPPED, skipped)
    tl.store(control + f.CONSECUTIVE, run)
    tl.store(control + f.LAST_OFFENDER, latest)
    if RECORD:
        _record(control, events, CAPACITY, applied, skipped, run, latest)


@triton.jit
def finish(
    table, grads, groups, rates, stats, sums, n_tiles, ranges, pools, totals, control, finite, events, n_tensors,
    n_groups, SIZE: tl.constexpr, MEASURES: tl.constexpr, GLOBAL: tl.constexpr, RECORD: tl.constexpr,
    CAPACITY: tl.constexpr,
):  # fmt: skip
    """Leaves to the next step what this one measured and counted; for two programs, which write nothing in common."""
    is_finite = tl.load(finite) != 0
    if tl.program_id(0) == 0:
        _tune(
            table, grads, groups, rates, stats, sums, n_tiles, ranges, pools, totals, is_finite, n_tensors, n_groups,
            SIZE, MEASURES, GLOBAL,
        )  # fmt: skip
    else:
        _count(table, grads, control, is_finite, events, n_tensors, SIZE, RECORD, CAPACITY)
