"""The seam between the optimizer and its fused backend: which buckets it steps, and one step through it."""

import functools
import itertools
import logging
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels.compile_backend import find_compile_obstacle
from ..kernels.support import find_obstacle
from ..transforms.self_tuning import MeasureAgreement
from .bucket import Bucket
from .context import observe_step
from .events import record_events
from .groups import log_rate_limits, schedule_factor, searches
from .guard import check_gradients
from .pairs import PairView
from .sharded_bucket import ShardedBucket
from .sweep import StepInputs, Sweep
from .tuning import BucketSums, add_pools, pools_of_groups

logger = logging.getLogger(__name__)
SUMS: tuple[str, ...] = ("agreement", "update", "momentum")  # of transforms.self_tuning.MeasureAgreement
COUNTERS = ("applied", "skipped", "consecutive", "offender")  # columns 1 to 4 of the control block


@functools.cache
def find_triton_problem() -> str | None:
    """Returns why triton cannot run here, and says so in the log, once; None where it can."""
    try:
        from ..kernels.trial import run_trial

        run_trial()
    except (ImportError, OSError, RuntimeError, AttributeError, ValueError) as error:
        logger.warning("triton cannot run here, the optimizer steps in eager stacks: %s", error)
        return f"triton cannot run: {error}"
    return None


def is_of_compiler(error: Exception) -> bool:
    """Whether an error is triton's, which could not compile a kernel, or whose kernel the GPU cannot hold."""
    errors = sys.modules.get("triton.errors")
    return (errors is not None and isinstance(error, errors.TritonError)) or "PassManager::run" in str(error)


_given_up: list[str] = []  # why triton could not compile the kernels here


def give_up_triton(error: Exception) -> str:
    """Has all parameters step in eager stacks from now on, which is said; returns why in a few words."""
    reason = f"triton cannot compile: {type(error).__name__}"
    if not _given_up:
        logger.warning("triton cannot compile the kernels here, the optimizer steps in eager stacks: %s", error)
        _given_up.append(reason)
    return reason


def choose_backend(bucket: Bucket, device: torch.device, is_spread: bool) -> tuple[str, str]:
    """Returns the backend that steps a bucket, and why it is no other, in a few words or none.

    Args:
        bucket: whose config names the backend that is wished for.
        device: of the optimizer's shared numbers, where fused parameters have to lie.
        is_spread: whether parameters of any bucket have rows on other ranks, which have to agree on every step.
    """
    wished = bucket.config.backend
    if wished == "eager" or (wished == "auto" and bucket.device.type != "cuda"):
        return "eager", ""
    if is_spread or isinstance(bucket, ShardedBucket):
        return "eager", "sharded parameters"
    if wished == "compile":
        problem = find_compile_obstacle(bucket)
        return ("compile", "") if problem is None else ("eager", problem)
    obstacle = find_obstacle(bucket) or (None if bucket.device == device else "on another device")
    obstacle = obstacle or next(iter(_given_up), None) or find_triton_problem()
    return ("triton", "") if obstacle is None else ("eager", obstacle)


class FusedStep:
    """Steps the buckets that the kernels can step together, and the others as ever.

    Args:
        groups: filled param groups.
        buckets: (number of the group, bucket).
        pairs: of these buckets.
        fused: the numbers of the buckets that the kernels step, at least one.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        buckets: Sequence[tuple[int, Bucket]],
        pairs: PairView,
        fused: Sequence[int],
    ) -> None:
        """Sorts the buckets; tables are made in the first step."""
        self.buckets, self.pairs, self.fused = list(buckets), pairs, list(fused)
        self.others = [number for number in range(len(buckets)) if number not in set(fused)]
        measures = [any(isinstance(t, MeasureAgreement) for t in bucket.chain) for _, bucket in buckets]
        self.measuring = {buckets[n][0] for n in fused if measures[n]}
        self.constants: list[list[float]] = []
        self.places: dict[int, int] = {}
        self.kernels: Any = None
        self.one = torch.ones((), device=groups[0]["params"][0].device)

    def stages(
        self,
        groups: Sequence[dict[str, Any]],
        grads: Sequence[Tensor | None],
        loss: Tensor | None,
        max_grad_norm: float | None,
        lr_pool: str,
    ) -> list[Callable[[], None]]:
        """Prepares a step, which changes nothing; what is returned takes it, each of them once and in order.

        Afterwards `groups` hold what the eager step would have left there. Each keeps its place where it is
        interrupted: launches are not repeated, other buckets go on with the chunk that was begun.

        Args:
            groups: filled param groups, whose numbers are on their device.
            grads: of all their parameters in order.
            loss: of the step, None without a context.
            max_grad_norm: largest norm of all gradients, None for no clip.
            lr_pool: 'global' or 'group'.
        """
        kernels, shared = self._current_kernels(groups), groups[0]
        self._adopt(groups)
        kernels.take_gradients([grads[i] for i in kernels.positions])
        kernels.take_groups(self._group_values(groups, kernels.counts, lr_pool))
        gains = self.pairs.row_gains()
        if gains:
            kernels.take_gains(gains, self.places)
        kernels.open(max_grad_norm, lr_pool == "global", shared["events"]["rows"] if loss is None else None)
        sweeps: list[list[Sweep]] = [[] for _ in self.others]
        shrunk: set[tuple[int, int]] = set()
        measured: list[BucketSums] = []
        edge: dict[str, Tensor] = {}
        rates = [group["effective_lr"] for group in groups]

        def look() -> None:
            if loss is not None:
                kernels.multiplier.copy_(shared["context_state"]["multiplier"])
            self._look_at_others(max_grad_norm)
            kernels.look()

        stages: list[Callable[[], None]] = [
            look,
            lambda: measured.extend(self._step_others(groups, gains, max_grad_norm, sweeps)),
            kernels.sweep,
            kernels.close,
            lambda: shared.update(host_steps=shared.get("host_steps", 0) + 1),
            lambda: self.pairs.shrink_spectra(rates, kernels.finite, shared["host_steps"], shrunk),
        ]
        if loss is not None:
            stages += [
                lambda: edge.update(self._observe(groups, loss, measured)),
                lambda: record_events(shared["events"], shared["counters"], edge),
            ]
        return stages

    def tables_hold(self) -> bool:
        """Whether every weight that the kernels step lies where their tables say; forgets tables that do not hold."""
        if self.kernels is not None and not self.kernels.is_current():
            self.kernels = None
        return self.kernels is not None

    def is_in_place(self) -> bool:
        """Whether weights and gradients still lie where the kernels saw them, so that a step can go on."""
        return self.tables_hold() and self.kernels.are_gradients_in_place()

    def _current_kernels(self, groups: Sequence[dict[str, Any]]) -> Any:
        """Returns the kernels with their tables, made anew where weights have moved since `tables_hold` was asked."""
        if self.kernels is None:
            from ..kernels.table import CONSTANTS, group_constants
            from ..kernels.triton_backend import TritonStep

            chosen = [self.buckets[number] for number in self.fused]
            ends = itertools.accumulate((len(bucket.params) for _, bucket in chosen), initial=0)
            self.places = dict(zip(self.fused, ends, strict=False))
            self.kernels = TritonStep(chosen, len(groups))
            configs = {index: bucket.config for index, bucket in self.buckets}
            empty = [0.0] * CONSTANTS
            self.constants = [group_constants(configs[i]) if i in configs else empty for i in range(len(groups))]
        return self.kernels

    def _adopt(self, groups: Sequence[dict[str, Any]]) -> None:
        """Makes the shared numbers of the groups views of what the kernels read and write; costs a comparison."""
        kernels = self.kernels
        for group, rates in zip(groups, kernels.rate_views, strict=True):
            if group.get("log_rate") is not rates[0] or group.get("update_rms") is not rates[-1]:
                rates[0].copy_(group["log_rate"])
                rates[-1].copy_(group["update_rms"])
                group["log_rate"], group["base_lr"], group["effective_lr"], group["update_rms"] = rates
        shared = groups[0]
        for name, view in zip(COUNTERS, kernels.counter_views, strict=False):
            if shared["counters"][name] is not view:
                shared["counters"][name] = view.copy_(shared["counters"][name])
        recorded = kernels.counter_views[-1]
        if shared["events"]["recorded"] is not recorded:
            shared["events"]["recorded"] = recorded.copy_(shared["events"]["recorded"])
        if not shared["events"]["rows"].is_contiguous():
            shared["events"]["rows"] = shared["events"]["rows"].contiguous()

    def _group_values(self, groups: Sequence[dict[str, Any]], numels: Sequence[int], lr_pool: str) -> list[float]:
        """Writes the groups' lines of `kernels.fields`, from LR on."""
        others = [0] * len(groups)
        for number in self.others:
            index, bucket = self.buckets[number]
            others[index] += bucket.numel_with_grad()
        pools: dict[int, tuple[float, ...]] = {}
        for members in pools_of_groups(groups, lr_pool):
            tuned = [groups[i] for i in members]
            count = sum(numels[i] + others[i] for i in members)
            limits = log_rate_limits(tuned)
            line = (tuned[0]["lr_speed"], tuned[0]["lr_drift"], *limits, math.sqrt(count / 8) / 4, float(count > 0))
            pools |= dict.fromkeys(members, line)
        values: list[float] = []
        for i, (group, constants) in enumerate(zip(groups, self.constants, strict=True)):
            values += [
                group["lr"],
                group["initial_lr"],
                schedule_factor(group),
                group["min_lr"],
                group["max_lr"],
                group["warmup_steps"],
                float(group["self_tuning"]),
                float(group["context"]),
                *pools.get(i, (0.0,) * 6),
                float(searches(group)),
                group["rail_steps"],
                numels[i] + others[i],
                *constants,
            ]
        return values

    def _look_at_others(self, max_grad_norm: float | None) -> None:
        """Looks at the gradients of the other buckets before anything is changed."""
        found = [
            (p.grad, i)
            for number in self.others
            for p, i in zip(self.buckets[number][1].params, self.buckets[number][1].positions, strict=True)
            if p.grad is not None
        ]
        if self.others:
            self.kernels.outside.fill_(-1)
            self.kernels.outside_square.zero_()
        if found:
            grads, positions = [grad for grad, _ in found], [i for _, i in found]
            check = check_gradients(grads, positions, None if max_grad_norm is None else 1.0)
            self.kernels.outside.copy_(check.offender)
            if check.norm is not None:
                self.kernels.outside_square.copy_(check.norm.square())

    def _step_others(
        self,
        groups: Sequence[dict[str, Any]],
        gains: Mapping[int, Tensor],
        max_grad_norm: float | None,
        sweeps: Sequence[list[Sweep]],
    ) -> list[BucketSums]:
        """Steps the other buckets, and hands their sums to the kernels."""
        measured = []
        for number, done in zip(self.others, sweeps, strict=True):
            index, bucket = self.buckets[number]
            on = bucket.device
            clip = None if max_grad_norm is None else self.kernels.clip.to(on)
            rate, finite = groups[index]["effective_lr"].to(on), self.kernels.finite.to(on)
            sums = bucket.step(StepInputs(rate, finite, clip, gains.get(number)), done)
            measured.append(BucketSums(index, *sums, bucket.numel_with_grad()))
        for i, line in enumerate(self.kernels.outside_pools if measured else ()):
            zero = line.new_zeros(())
            pool = add_pools(line.device, [sums.pool for sums in measured if sums.group == i and sums.pool])
            squares = [sums.squares.to(zero) for sums in measured if sums.group == i]
            values = [*(pool[name].to(zero) if pool else zero for name in SUMS), torch.stack([zero, *squares]).sum()]
            line.copy_(torch.stack(values))
        return measured

    def _observe(
        self, groups: Sequence[dict[str, Any]], loss: Tensor, measured: Sequence[BucketSums]
    ) -> dict[str, Tensor]:
        """Shows the step to the context; returns what it reports."""
        seen = self.measuring | {sums.group for sums in measured if sums.pool}
        lines = [self.kernels.totals[i] for i, group in enumerate(groups) if group["context"] and i in seen]
        pool = dict(zip(SUMS, torch.stack(lines).sum(0).unbind(), strict=True)) if lines else {}
        return observe_step(groups, pool, loss, self.kernels.finite)
