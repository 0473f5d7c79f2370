"""What the report computes: ratios to AdamW's best, widths in decades, paired differences with their tests."""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence

from .lines import Line

RIVAL, OURS, SEARCH = "AdamW", "automagic_8bit", "search"
ANY = 5e-5  # the Trainer's default, where the starting rate is not the question
GOAL, NEAR = 1.05, 1.02  # every cell within the first, with no argument within the second
MARGIN = 0.01  # of the test of equivalence
RESAMPLES = 9999

Cell = tuple[str, int]  # task, horizon
Place = tuple[str, int, int]  # task, horizon, seed


def diverged(lines: Iterable[Line]) -> list[Line]:
    """Returns the runs whose held-out loss is not finite."""
    return [line for line in lines if not math.isfinite(line["loss"])]


class Results:
    """Losses by task, horizon and seed; one that is not finite counts as the highest of its task and horizon."""

    def __init__(self, lines: Iterable[Line]) -> None:
        """Keeps the loss of every arm at every starting rate."""
        self.lines = list(lines)
        worst: dict[Cell, float] = {}  # a cell without any is left out
        for line in self.lines:
            if math.isfinite(line["loss"]):
                cell = (line["task"], line["horizon"])
                worst[cell] = max(worst.get(cell, 0.0), line["loss"])
        self.losses: dict[Place, dict[str, dict[float, float]]] = {}
        for line in self.lines:
            place = (line["task"], line["horizon"], line["seed"])
            if place[:2] in worst:
                loss = line["loss"] if math.isfinite(line["loss"]) else worst[place[:2]]
                self.losses.setdefault(place, {}).setdefault(line["arm"], {})[line["lr"]] = loss
        self.tasks = sorted({line["task"] for line in self.lines})
        self.horizons = sorted({line["horizon"] for line in self.lines})
        self.arms = list(dict.fromkeys(line["arm"] for line in self.lines))

    def cells(self) -> list[Cell]:
        """Lists tasks and horizons that AdamW was run on, short runs first."""
        cells = {place[:2] for place, arms in self.losses.items() if RIVAL in arms}
        return sorted(cells, key=lambda cell: (cell[1], cell[0]))

    def places(self, cell: Cell | None = None) -> list[Place]:
        """Lists what was run, of one cell or of all."""
        return sorted(place for place in self.losses if cell in (None, place[:2]))

    def rates(self, cell: Cell, arm: str) -> list[float]:
        """Lists the starting rates that an arm was run at, whatever the seed."""
        return sorted({lr for place in self.places(cell) for lr in self.losses[place].get(arm, {})})

    def best(self, place: Place) -> tuple[float, float] | None:
        """Returns the rate and the loss of AdamW's best run with this seed."""
        runs = self.losses.get(place, {}).get(RIVAL)
        return min(runs.items(), key=lambda run: run[1]) if runs else None

    def starts(self, place: Place, arm: str) -> dict[float, float]:
        """Returns the ratio of an arm's loss to AdamW's best with the same seed, at each starting rate."""
        runs, best = self.losses.get(place, {}).get(arm, {}), self.best(place)
        return {lr: runs[lr] / best[1] for lr in sorted(runs)} if best else {}

    def ratios(self, cell: Cell, arm: str, lr: float = ANY) -> list[float]:
        """Returns an arm's ratios to AdamW's best, one for each seed that was run."""
        found = [self.starts(place, arm).get(lr) for place in self.places(cell)]
        return [ratio for ratio in found if ratio is not None]

    def log_ratios(self, arm: str, anchor: str, lr: float = ANY) -> dict[Place, float]:
        """Returns the logarithms of an arm's losses over the anchor's, seed by seed."""
        both = {p: (runs.get(arm, {}).get(lr), runs.get(anchor, {}).get(lr)) for p, runs in self.losses.items()}
        return {p: math.log(a / b) for p, (a, b) in sorted(both.items()) if a is not None and b is not None}


def decades_within(ratios: dict[float, float], limit: float = GOAL) -> float:
    """Returns over how many decades of the starting rate the ratio stays at or below a limit.

    Between neighbours the logarithm of the ratio is a straight line over the logarithm of the rate.
    """
    points = [(math.log10(lr), math.log(ratio / limit)) for lr, ratio in sorted(ratios.items())]
    width = 0.0
    for (left, a), (right, b) in itertools.pairwise(points):
        if a <= 0 and b <= 0:
            share = 1.0
        elif a > 0 and b > 0:
            share = 0.0
        else:
            share = min(a, b) / (min(a, b) - max(a, b))
        width += share * (right - left)
    return width


@dataclasses.dataclass(frozen=True)
class Paired:
    """What pairs say.

    Args:
        count: of pairs.
        mean: of the logarithms of the ratios.
        low: lower end of the 95% bootstrap interval of the mean.
        high: its upper end.
        p_equal: of two one-sided t tests that the mean lies outside the margin; below 0.05 the arms are equal.
    """

    count: int
    mean: float
    low: float
    high: float
    p_equal: float


def compare(differences: Sequence[float], margin: float = MARGIN) -> Paired | None:
    """Summarises paired logarithms of ratios, or nothing where there are fewer than two."""
    import numpy as np
    from scipy import stats

    values = np.asarray(differences, dtype=np.float64)
    if len(values) < 2:
        return None
    mean, bound = float(values.mean()), math.log1p(margin)
    if not values.std() > 0:
        return Paired(len(values), mean, mean, mean, float(abs(mean) >= bound))
    # drawn by a fixed seed, so that the same lines give the same report
    drawn = stats.bootstrap(
        (values,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    _, above = stats.ttest_1samp(values, -bound, alternative="greater")
    _, below = stats.ttest_1samp(values, bound, alternative="less")
    return Paired(len(values), mean, float(drawn.low), float(drawn.high), float(np.max((above, below))))
