"""Stage 8, the context: watches the losses and the pooled cosine, halves the rate when training is in danger.

This is the project's own heuristic, not a published method. Plain python floats; what step t uses was computed after
step t - 1.
"""

import math
import statistics

FEWEST_LOSSES = 20


class ReferenceContext:
    """Turns the history of losses and cosines into a multiplier M in [0.5, 2] and an edge-case flag.

    context_window: losses remembered, and the horizon of the consistency. edge_threshold: instability in [0, 1] from
    which a step is an edge case; lower is more sensitive. adaptation_rate: share of the way that M moves towards its
    target per step.
    """

    def __init__(self, context_window: int = 100, edge_threshold: float = 0.95, adaptation_rate: float = 0.1) -> None:
        """Starts with no history: M = 1, no edge case."""
        self.context_window = context_window
        self.edge_threshold = edge_threshold
        self.adaptation_rate = adaptation_rate
        self.losses: list[float] = []
        self.consistency = 0.0  # C
        self.non_finite = 0.0  # s_nf
        self.instability = 0.0  # s
        self.trend = 0.0  # q, positive while the loss falls
        self.is_edge_case = False
        self.multiplier = 1.0  # M

    def note_skipped_step(self) -> None:
        """Remembers that a step had a non-finite gradient: s_nf = 1. M itself waits for the next applied step."""
        self.non_finite = 1.0

    def advance(self, cosine: float, loss: float | None) -> None:
        """Takes in one applied step: C, the loss ring, the instability s, then M for the next step.

        C <- C + (cosine - C) / window;  s = max(s_loss, clip(-2 C, 0, 1), s_nf);  edge case iff s >= threshold;
        M* = 1/2 in an edge case, else clip(exp(C/2 + max(q, 0)/4 - 0.7 max(-q, 0)), 1/2, 2);
        M <- clip(M + rate (M* - M), 1/2, 2).
        """
        self.consistency += (cosine - self.consistency) / self.context_window
        if loss is not None and math.isfinite(loss):
            self.losses = [*self.losses, loss][-self.context_window :]
        spike, self.trend = read_losses(self.losses)
        self.instability = max(spike, clip(-2 * self.consistency, 0, 1), self.non_finite)
        self.is_edge_case = self.instability >= self.edge_threshold
        self.non_finite *= 0.9
        target = 0.5 if self.is_edge_case else self._calm_target()
        self.multiplier = clip(self.multiplier + self.adaptation_rate * (target - self.multiplier), 0.5, 2)

    def _calm_target(self) -> float:
        """M* outside an edge case: up while steps agree and the loss falls, down faster while it rises."""
        return clip(math.exp(0.5 * self.consistency + 0.25 * max(self.trend, 0) - 0.7 * max(-self.trend, 0)), 0.5, 2)


def read_losses(losses: list[float]) -> tuple[float, float]:
    """Compares the newest loss with the line through the older ones: (s_loss, q), both 0 with fewer than 20 of them.

    o, w = medians of the older and newer half; slope = (w - o) / (n - n//2); r = window minus slope * (i - (n-1)/2);
    c = median(r); sg = max(1.4826 median|r - c|, 1e-3 |c|, 1e-30); pred = max(w, c + slope (n - (n-1)/2));
    z = max(0, (L - pred) / sg); s_loss = 1 - exp(-z / 2.5); q = tanh((o - w) / (1.2533 sg sqrt(2 / (n//2))) / 8).
    """
    window, newest = losses[:-1], losses[-1] if losses else 0.0
    n = len(window)
    if n < FEWEST_LOSSES:
        return 0.0, 0.0
    half = n // 2
    older, newer = statistics.median(window[:half]), statistics.median(window[n - half :])
    slope = (newer - older) / (n - half)
    middle = (n - 1) / 2
    levelled = [loss - slope * (i - middle) for i, loss in enumerate(window)]
    centre = statistics.median(levelled)
    spread = max(1.4826 * statistics.median(abs(r - centre) for r in levelled), 1e-3 * abs(centre), 1e-30)
    predicted = max(newer, centre + slope * (n - middle))
    z = max(0.0, (newest - predicted) / spread)
    trend = math.tanh((older - newer) / (1.2533 * spread * math.sqrt(2 / half)) / 8)
    return 1 - math.exp(-z / 2.5), trend


def clip(x: float, low: float, high: float) -> float:
    """Keeps x within [low, high]."""
    return min(max(x, low), high)
