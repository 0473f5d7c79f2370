"""The C-Optim context: losses and gradient consistency decide how boldly the next step may go, all on the device."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..transforms.self_tuning import agreement_cosine

FEWEST_LOSSES = 20  # fewer older losses say nothing about the newest one
LARGEST_LOSS = 1e30  # beyond it the statistics below could overflow float32; such a loss counts as non-finite
LOWEST, HIGHEST = 0.5, 2.0  # bounds of the multiplier
HISTORY = ("losses", "consistency", "multipliers", "learning_rates")  # columns of the saved history


@dataclasses.dataclass(frozen=True)
class StepSignals:
    """What one step tells the context, all on one device.

    Args:
        cosine: agreement of the gradient with the momentum, pooled over all parameters  # [], float32
        loss: loss of the step, NaN where none was seen  # [], float32
        learning_rate: mean rate that the step applied, for the history  # [], float32
        finite: whether the step was applied; a skipped one only raises the alarm  # [], bool
    """

    cosine: Tensor
    loss: Tensor
    learning_rate: Tensor
    finite: Tensor


@dataclasses.dataclass(frozen=True)
class ContextHistory:
    """The last applied steps, oldest first, at most `context_window` of them.

    Args:
        losses: NaN where a step saw no loss.
        consistency: the moving average of the cosine after each step.
        multipliers: what each step multiplied its rates by.
        learning_rates: mean rate over all elements that each step applied.
    """

    losses: tuple[float, ...]
    consistency: tuple[float, ...]
    multipliers: tuple[float, ...]
    learning_rates: tuple[float, ...]


class ContextController:
    """Tells what the context did in the last applied step; every call reads the device and changes nothing.

    The context is this project's own heuristic (arXiv 2411.16085, which its origin cites, is the cautious mask). While
    `context` is off, or before the first step, it reports an untouched rate: no edge case, multiplier 1.
    """

    def __init__(self, optimizer: Any) -> None:
        """Looks at an Automagic; keeps nothing of its own."""
        self._optimizer = optimizer

    def detect_edge_case(self) -> bool:
        """Says whether the last step was an edge case, so that the multiplier moves towards 0.5."""
        return bool(self._read("is_edge_case"))

    def compute_contextual_lr_multiplier(self) -> float:
        """Returns the multiplier that the last step applied: effective_lr = base_lr * multiplier, in [0.5, 2]."""
        return self._read("applied_multiplier")

    def compute_gradient_consistency(self) -> float:
        """Returns the moving average of the cosine between gradient and momentum, in [-1, 1]; 0 is pure noise."""
        return self._read("consistency")

    def compute_loss_stability(self) -> float:
        """Returns how well the newest loss fits the older ones: 1 as expected or better, towards 0 a spike."""
        return 1.0 - self._read("loss_spike")

    def history(self) -> ContextHistory:
        """Returns losses, consistency, multipliers and learning rates of the last applied steps."""
        state = self._state()
        rows = state["history"].tolist() if state else []
        columns = zip(*[row for row in rows if row[HISTORY.index("multipliers")] > 0], strict=True)
        return ContextHistory(**dict(zip(HISTORY, list(columns) or [()] * len(HISTORY), strict=True)))

    def _read(self, name: str) -> float:
        state = self._state()
        return float(state[name]) if state else INITIAL[name]

    def _state(self) -> Mapping[str, Tensor]:
        return self._optimizer.param_groups[0].get("context_state", {})


INITIAL = {
    "consistency": 0.0,  # C
    "loss_spike": 0.0,  # s_loss
    "trend": 0.0,  # q, positive while the loss falls
    "non_finite": 0.0,  # s_nf
    "instability": 0.0,  # s
    "is_edge_case": 0.0,
    "multiplier": 1.0,  # M of the next step
    "applied_multiplier": 1.0,  # M of the last applied step
}


def fit_context(group: dict[str, Any], device: torch.device) -> None:
    """Puts the context's state into the first param group, with room for `context_window` losses, on a device.

    Losses and history are registers that shift to the left, the newest at the end and NaN where there is none yet. A
    changed window keeps what fits of the newest.
    """
    state, window = group.get("context_state", {}), group["context_window"]
    fitted = {}
    for name, value in INITIAL.items():
        dtype = torch.bool if name == "is_edge_case" else torch.float32
        fitted[name] = state[name].to(device) if name in state else torch.full((), value, dtype=dtype, device=device)
    for name, shape in (("losses", (window,)), ("history", (window, len(HISTORY)))):
        empty = torch.full(shape, torch.nan, device=device)
        fitted[name] = torch.cat([empty, state[name].to(device)])[-window:].clone() if name in state else empty
    group["context_state"] = fitted


def context_bytes(window: int) -> int:
    """Returns the bytes of what `fit_context` makes."""
    return 4 * (len(INITIAL) - 1) + 1 + 4 * window * (1 + len(HISTORY))


def observe_step(
    groups: Sequence[dict[str, Any]], pool: Mapping[str, Tensor], loss: Tensor, finite: Tensor
) -> dict[str, Tensor]:
    """Shows a step to the context, whose state in the first group it replaces.

    Args:
        groups: all param groups, stepped.
        pool: sums of the agreement between gradient and momentum, empty where nothing was measured  # each []
        loss: of the step, NaN where none was seen  # []
        finite: whether the step was applied  # [], bool

    Returns:
        Whether an edge case started, its instability, and the threshold  # each []
    """
    shared = groups[0]
    before, threshold = shared["context_state"], shared["edge_case_threshold"]
    signals = StepSignals(
        cosine=agreement_cosine(pool).to(torch.float32) if pool else torch.zeros_like(loss),
        loss=loss,
        learning_rate=_mean_rate(groups, loss.device),
        finite=finite.to(loss.device),
    )
    after = advance_context(before, signals, edge_case_threshold=threshold, adaptation_rate=shared["adaptation_rate"])
    started = after["is_edge_case"] & ~before["is_edge_case"]
    edge = {"started": started, "value": after["instability"], "threshold": torch.full_like(loss, threshold)}
    shared["context_state"] = after
    return edge


def _mean_rate(groups: Sequence[Mapping[str, Any]], device: torch.device) -> Tensor:
    """Returns the mean rate over all elements  # []."""
    sizes = [sum(p.numel() for p in group["params"]) for group in groups]
    total = max(1, sum(sizes))
    shares = [group["effective_lr"].to(device) * (size / total) for group, size in zip(groups, sizes, strict=True)]
    return torch.stack(shares).sum()


def advance_context(
    state: Mapping[str, Tensor], signals: StepSignals, *, edge_case_threshold: float, adaptation_rate: float
) -> dict[str, Tensor]:
    """Takes in one step and decides the multiplier M of the next.

        C <- C + (cosine - C) / window;  s = max(s_loss, clip(-2 C, 0, 1), s_nf);  edge case iff s >= threshold
        M* = 0.5 in an edge case, else clip(exp(0.5 C + 0.25 max(q, 0) - 0.7 max(-q, 0)), 0.5, 2)
        M <- clip(M + adaptation_rate (M* - M), 0.5, 2)

    A skipped step changes none of them. It sets s_nf = 1, which the next applied step reads and each applied step
    multiplies by 0.9.

    Args:
        state: as `fit_context` made it.
        signals: what the step tells.
        edge_case_threshold: instability in [0, 1] from which on a step is an edge case; lower is more sensitive.
        adaptation_rate: share of the way that M goes to its target in a step; larger reacts faster.
    """
    is_usable = signals.loss.abs() <= LARGEST_LOSS
    losses = torch.where(is_usable, _push(state["losses"], signals.loss), state["losses"])
    spike, trend = read_losses(losses)
    consistency = state["consistency"] + (signals.cosine - state["consistency"]) / losses.numel()
    instability = spike.maximum((-2 * consistency).clamp(0, 1)).maximum(state["non_finite"])
    is_edge_case = instability >= edge_case_threshold
    calm = (0.5 * consistency + 0.25 * trend.clamp_min(0) + 0.7 * trend.clamp_max(0)).exp().clamp(LOWEST, HIGHEST)
    target = torch.where(is_edge_case, LOWEST, calm)
    applied = state["multiplier"]
    row = torch.stack([signals.loss, consistency, applied, signals.learning_rate])
    advanced = {
        "losses": losses,
        "history": _push(state["history"], row),
        "consistency": consistency,
        "loss_spike": spike,
        "trend": trend,
        "instability": instability,
        "is_edge_case": is_edge_case,
        "multiplier": (applied + adaptation_rate * (target - applied)).clamp(LOWEST, HIGHEST),
        "applied_multiplier": applied,
    }
    kept = {name: torch.where(signals.finite, value, state[name]) for name, value in advanced.items()}
    return kept | {"non_finite": torch.where(signals.finite, 0.9 * state["non_finite"], 1.0)}


def _push(register: Tensor, newest: Tensor) -> Tensor:
    """Shifts a register by one place for the newest entry; the oldest falls out  # same shape."""
    return torch.cat([register[1:], newest[None]])


def read_losses(losses: Tensor) -> tuple[Tensor, Tensor]:
    """Compares the newest loss with the line through the older ones, and their newer half with the older half.

        slope = (w - o) / (n - n//2), o and w the medians of the halves;  r = losses minus slope * (i - (n-1)/2)
        c = median(r);  sg = max(1.4826 median|r - c|, 1e-3 |c|, 1e-30)
        pred = max(w, c + slope (n - (n-1)/2));  s_loss = 1 - exp(-max(0, (L - pred) / sg) / 2.5)
        q = tanh((o - w) / (1.2533 sg sqrt(2 / (n//2))) / 8)

    Medians, because one spike must not hide the next. A loss that falls all the time, or is negative, is no danger.

    Args:
        losses: oldest first, NaN before the first of them  # [window], float32

    Returns:
        s_loss in [0, 1] and the trend q in [-1, 1], positive while the loss falls; zeros with fewer than 20 older
        losses  # each []
    """
    window, newest = losses[:-1], losses[-1]
    n = (~window.isnan()).sum()
    half = n // 2
    i = torch.arange(window.numel(), device=losses.device) - (window.numel() - n)  # below 0 where there is no loss yet
    halves = torch.stack([(i >= 0) & (i < half), i >= n - half])
    older, newer = _median(window, halves, half).unbind()

    slope, middle = (newer - older) / (n - half), (n - 1) / 2
    levelled = window - slope * (i - middle)
    centre = _median(levelled, i >= 0, n)
    spread = 1.4826 * _median((levelled - centre).abs(), i >= 0, n)
    spread = spread.maximum(1e-3 * centre.abs()).clamp_min(1e-30)

    predicted = newer.maximum(centre + slope * (n - middle))
    spike = -torch.expm1(((newest - predicted) / spread).clamp_min(0) / -2.5)
    trend = torch.tanh((older - newer) / (1.2533 * spread * (2 / half).sqrt()) / 8)
    enough = n >= FEWEST_LOSSES
    return torch.where(enough, spike, 0.0), torch.where(enough, trend, 0.0)


def _median(values: Tensor, valid: Tensor, count: Tensor) -> Tensor:
    """Returns the median of the valid entries along the last axis, which `count` counts  # values.shape[:-1]."""
    ranked = torch.where(valid, values, torch.inf).sort(-1).values
    middle = torch.stack([(count - 1).clamp_min(0) // 2, count // 2])
    return ranked.index_select(-1, middle).mean(-1)
