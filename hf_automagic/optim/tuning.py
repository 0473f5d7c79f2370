"""The tuned rates between two steps: pooled sums of one step become the rates of the next."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..transforms.self_tuning import log_rate_step
from .groups import log_rate_limits, searches


class BucketSums(NamedTuple):
    """What a bucket measured in a step.

    Args:
        group: number of the group it belongs to.
        pool: sums for the next step  # each []
        squares: sum of the squared changes of the weights  # []
        numel: elements that took part.
    """

    group: int
    pool: dict[str, Tensor]
    squares: Tensor
    numel: int


def measure_updates(groups: Sequence[dict[str, Any]], measured: Sequence[BucketSums], finite: Tensor) -> None:
    """Keeps the RMS of the change of each group's weights in the last applied step, in units of the weights."""
    for i, group in enumerate(groups):
        parts = [sums for sums in measured if sums.group == i]
        if numel := sum(sums.numel for sums in parts):
            mean = _sum_on(finite.device, [sums.squares for sums in parts]) / numel
            group["update_rms"] = torch.where(finite, mean.sqrt().to(torch.float32), group["update_rms"])


def tune_rates(groups: Sequence[dict[str, Any]], measured: Sequence[BucketSums], finite: Tensor, lr_pool: str) -> None:
    """Moves the log rate of each pool of groups that search; what it decides takes effect in the next step.

    Args:
        groups: filled param groups.
        measured: the sums of all buckets.
        finite: whether the step was applied; otherwise nothing moves  # [], bool
        lr_pool: 'global' or 'group'.
    """
    rates: dict[int, Tensor] = {}
    for members in pools_of_groups(groups, lr_pool):
        parts = [sums for sums in measured if sums.group in members and sums.pool]
        if not parts:
            continue
        tuned = [groups[i] for i in members]
        pool, numel = add_pools(finite.device, [sums.pool for sums in parts]), sum(sums.numel for sums in parts)
        change = log_rate_step(pool, numel, tuned[0]["lr_speed"], tuned[0]["lr_drift"]).to(torch.float32)
        lower, upper = log_rate_limits(tuned)
        for i, group in zip(members, tuned, strict=True):
            moved = (group["log_rate"] + change).clamp(lower, upper)
            rates[i] = torch.where(finite, moved, group["log_rate"])
    for i, rate in rates.items():
        groups[i]["log_rate"] = rate


def pools_of_groups(groups: Sequence[Mapping[str, Any]], lr_pool: str) -> list[list[int]]:
    """Lists the groups that share a tuned rate."""
    tuned = [i for i, group in enumerate(groups) if searches(group)]
    if lr_pool == "group":
        return [[i] for i in tuned]
    return [tuned] if tuned else []


def add_pools(device: torch.device, pools: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Adds up the sums of several buckets, in order, on one device; nothing where there are none  # each []"""
    return {name: _sum_on(device, [pool[name] for pool in pools]) for name in (pools[0] if pools else ())}


def _sum_on(device: torch.device, values: Iterable[Tensor]) -> Tensor:
    return torch.stack([value.to(device) for value in values]).sum()
