"""One record of an optimizer as plain Python numbers, read from the device in one transfer."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..optim.automagic import Automagic
from ..optim.events import Event, name_at, read_events
from ..optim.groups import effective_lr, parameter_names, searches
from ..optim.roles import Role
from ..transforms.self_tuning import element_factor
from .rates import RateSummary, Scalar, local, read_at_once, unwrap_optimizer, weigh_rates

__all__ = ["GroupSnapshot", "OptimizerSnapshot", "unwrap_optimizer"]

SAMPLE = 2**22  # largest number of codes looked at, so that a snapshot of a large model stays a few MB and ms
SATURATED_CODE = 127

# What a role is called in log keys: few keys, and the ones a user asks for. All others go by the rails they step at.
ROLE_KEYS = {
    Role.LORA_A: "A",
    Role.EMBEDDING_A: "A",
    Role.LORA_B: "B",
    Role.EMBEDDING_B: "B",
    Role.NEW: "new",
}


def role_key(role: str, is_full_weight: bool) -> str:
    """Returns what a group is called in log keys: A, B, new, full or adapter.

    A bias of a pretrained layer counts as full, that of a new head or of an adapter as adapter.

    Args:
        role: value of `optim.roles.Role`.
        is_full_weight: whether the group steps at the rails of pretrained weights.
    """
    return ROLE_KEYS.get(Role(role), "full" if is_full_weight else "adapter")


@dataclasses.dataclass(frozen=True)
class GroupSnapshot:
    """One param group.

    Args:
        role: value of `optim.roles.Role`.
        is_full_weight: whether it steps at the rails of pretrained weights.
        adapter: the adapter's name, empty outside PEFT.
        parameters: number of tensors.
        elements: number of their elements.
        lr: smallest, mean and largest rate of an element in the last step.
        scheduled_lr: `group["lr"]`, the scheduler's.
        initial_lr: where the scheduler and the search started.
        min_lr: lower rail.
        max_lr: upper rail.
        self_tuning: whether the rate moves between the rails.
        rail_position: where the tuned rate stands on the logarithmic way from the lower rail, 0, to the upper one, 1;
            None where nothing is searched for.
    """

    role: str
    is_full_weight: bool
    adapter: str
    parameters: int
    elements: int
    lr: RateSummary
    scheduled_lr: float
    initial_lr: float
    min_lr: float
    max_lr: float
    self_tuning: bool
    rail_position: float | None

    @property
    def key(self) -> str:
        """What the group is called in log keys, see `role_key`."""
        return role_key(self.role, self.is_full_weight)


@dataclasses.dataclass(frozen=True)
class OptimizerSnapshot:
    """What an Automagic did up to now, as plain numbers.

    Args:
        name: the class of the optimizer.
        applied_steps: steps that changed parameters.
        skipped_steps: steps left out because a gradient was not finite.
        skipped_in_a_row: those since the last applied step.
        offender: name of the first parameter with a non-finite gradient in the last skipped step, None without one.
        lr: smallest, mean and largest rate of an element in the last step.
        groups: the param groups.
        update_rms: RMS of the change of all weights in the last applied step, in units of the weights.
        state_bytes: bytes of optimizer state, everything counted.
        saturated_fraction: share of the momentum's 8-bit codes at the end of their range, at least one in a block;
            None without such codes.
        multiplier: what the context controller multiplied the rate with, None without one.
        consistency: its gradient consistency, None without one.
        event_count: number of events that there ever were.
        events: the newest of them, oldest first.
        effective_rank: mean over the LoRA pairs of exp(entropy of the singular values of BA), None without pairs.
    """

    name: str
    applied_steps: int
    skipped_steps: int
    skipped_in_a_row: int
    offender: str | None
    lr: RateSummary
    groups: tuple[GroupSnapshot, ...]
    update_rms: float
    state_bytes: int
    saturated_fraction: float | None = None
    multiplier: float | None = None
    consistency: float | None = None
    event_count: int = 0
    events: tuple[Event, ...] = ()
    effective_rank: float | None = None

    @classmethod
    def take(cls, optimizer: Any) -> "OptimizerSnapshot":
        """Reads an Automagic; the only moment when the host waits for the device.

        Args:
            optimizer: an Automagic, or a wrapper around one.

        Raises:
            TypeError: there is no Automagic inside.
        """
        inner = unwrap_optimizer(optimizer)
        if not isinstance(inner, Automagic):
            raise TypeError(
                f"a snapshot needs an Automagic, got {type(inner).__name__}; summarize_rates() reads others"
            )
        shared = inner.param_groups[0]
        read = read_at_once(
            {
                **_counters(shared),
                **_rates(inner),
                **_saturation(inner),
                **_context(shared),
                **_pair_ranks(inner),
                **shared.get("events", {}),
            }
        )
        values = {key: float(value) for key, value in read.items() if value.numel() == 1}
        groups = tuple(_group(i, group, values) for i, group in enumerate(inner.param_groups))
        offender, names = int(values["offender"]), parameter_names(inner.param_groups)
        events = read_events({"rows": read["rows"], "recorded": read["recorded"]}, names) if "rows" in read else ()
        rates = [(rate, g.elements) for g in groups for rate in (g.lr.minimum, g.lr.maximum)]
        mean = weigh_rates([(g.lr.mean, g.elements) for g in groups]).mean
        return cls(
            name=type(inner).__name__,
            applied_steps=int(values["applied"]),
            skipped_steps=int(values["skipped"]),
            skipped_in_a_row=int(values["consecutive"]),
            offender=None if offender < 0 else name_at(offender, names),
            lr=dataclasses.replace(weigh_rates(rates), mean=mean),
            groups=groups,
            update_rms=math.sqrt(
                weigh_rates([(values["update_rms", i] ** 2, g.elements) for i, g in enumerate(groups)]).mean
            ),
            state_bytes=inner.memory_stats().total_bytes,
            saturated_fraction=values.get("saturated"),
            multiplier=values.get("applied_multiplier"),
            consistency=values.get("consistency"),
            event_count=events[-1].number if events else 0,
            events=tuple(events),
            effective_rank=values.get("effective_rank"),
        )

    def rates_by_role(self) -> dict[str, float]:
        """Returns the mean rate of each kind of parameter: A, B, new, full, adapter."""
        kinds: dict[str, list[tuple[float, int]]] = {}
        for group in self.groups:
            kinds.setdefault(group.key, []).append((group.lr.mean, group.elements))
        return {kind: weigh_rates(rates).mean for kind, rates in kinds.items() if any(n for _, n in rates)}

    @property
    def rail_position(self) -> float | None:
        """Mean position of the tuned rates between their rails, None where nothing is tuned."""
        positions = [(g.rail_position, g.elements) for g in self.groups if g.rail_position is not None and g.elements]
        return weigh_rates(positions).mean if positions else None

    def as_logs(self) -> dict[str, float]:
        """Returns at most 20 numbers under keys `optim/...`, Python floats all, for trackers."""
        values = {
            "lr_min": self.lr.minimum,
            "lr_mean": self.lr.mean,
            "lr_max": self.lr.maximum,
            **{f"lr_{kind}": rate for kind, rate in self.rates_by_role().items()},
            "rail_position": self.rail_position,
            "update_rms": self.update_rms,
            "multiplier": self.multiplier,
            "consistency": self.consistency,
            "events": self.event_count,
            "skipped_steps": self.skipped_steps,
            "skipped_in_a_row": self.skipped_in_a_row,
            "state_mb": self.state_bytes / 2**20,
            "saturated_frac": self.saturated_fraction,
            "effective_rank": self.effective_rank,
        }
        return {f"optim/{name}": float(value) for name, value in values.items() if value is not None}


def _counters(shared: Mapping[str, Any]) -> dict[Any, Scalar]:
    return {"applied": 0, "skipped": 0, "consecutive": 0, "offender": -1} | shared.get("counters", {})


def _rates(optimizer: Automagic) -> dict[Any, Scalar]:
    """Names the rates of each group, of its elements where each has its own, and its place between the rails."""
    values: dict[Any, Scalar] = {}
    for i, group in enumerate(optimizer.param_groups):
        one, zero = torch.ones(()), torch.zeros(())
        applied = group.get("effective_lr")
        values["lr", i] = applied if applied is not None else effective_lr({**group, "log_rate": zero}, one, zero)
        values |= {(name, i): group.get(name, 0.0) for name in ("log_rate", "update_rms")}
        values["group_lr", i] = group["lr"]
        sample = _sample(_states(optimizer, group, "lr_mask"))
        if sample.numel():
            factor = element_factor(sample)
            values |= {("low", i): factor.min(), ("mean", i): factor.mean(), ("high", i): factor.max()}
    return values


def _saturation(optimizer: Automagic) -> dict[Any, Scalar]:
    """Measures which share of the momentum's signed codes stands at the end of its range."""
    codes = [codes for group in optimizer.param_groups for codes in _states(optimizer, group, "exp_avg_codes")]
    sample = _sample([held for held in codes if held.dtype == torch.int8])
    return {"saturated": (sample.abs() == SATURATED_CODE).float().mean()} if sample.numel() else {}


def _context(shared: Mapping[str, Any]) -> dict[Any, Scalar]:
    state = shared.get("context_state", {})
    return {name: state[name] for name in ("applied_multiplier", "consistency") if name in state}


def _pair_ranks(optimizer: Automagic) -> dict[Any, Scalar]:
    """Measures the mean effective rank of the LoRA products, once there was a step."""
    ranks = optimizer.pair_ranks() if "effective_lr" in optimizer.param_groups[0] else None
    return {} if ranks is None else {"effective_rank": ranks.effective_rank.mean()}


def _states(optimizer: Automagic, group: Mapping[str, Any], name: str) -> list[Tensor]:
    """Returns one state of all parameters of a group that have it."""
    return [state[name] for p in group["params"] if name in (state := optimizer.state.get(p, {}))]


def _sample(tensors: list[Tensor]) -> Tensor:
    """Returns all elements of the tensors, or evenly spaced ones where there are more than SAMPLE."""
    shards = [local(t).flatten() for t in tensors]
    stride = max(1, math.ceil(sum(t.numel() for t in shards) / SAMPLE))
    device = shards[0].device if shards else torch.device("cpu")
    return torch.cat([t[::stride].to(device) for t in shards]) if shards else torch.empty(0)


def _group(index: int, group: Mapping[str, Any], values: Mapping[Any, float]) -> GroupSnapshot:
    lr = values["lr", index]
    factors = [values.get((name, index), 1.0) for name in ("low", "mean", "high")]
    start = float(group["initial_lr"])
    position = None
    if searches(group) and start > 0:
        low, high = (math.log(max(group[rail], 1e-38)) for rail in ("min_lr", "max_lr"))
        way = (math.log(start) + values["log_rate", index] - low) / (high - low) if high > low else 1.0
        position = min(1.0, max(0.0, way))
    return GroupSnapshot(
        role=group["role"],
        is_full_weight=group["is_full_weight"],
        adapter=group.get("adapter", ""),
        parameters=len(group["params"]),
        elements=sum(p.numel() for p in group["params"]),
        lr=RateSummary(*(lr * factor for factor in factors)),
        scheduled_lr=values["group_lr", index],
        initial_lr=start,
        min_lr=group["min_lr"],
        max_lr=group["max_lr"],
        self_tuning=group["self_tuning"],
        rail_position=position,
    )
