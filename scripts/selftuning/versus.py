"""The part of the report that sets arms against ours: the controller, changed parts, other optimizers."""

import math
import statistics
from collections.abc import Iterator

from .measures import NEAR, OURS, RIVAL, SEARCH, Paired, Results, compare
from .wording import marked, percent, rate, table, tasks_of


def null_arm(results: Results) -> Iterator[str]:
    """Yields the comparison of the controller with the null arm, and what follows from it."""
    differences = results.log_ratios(SEARCH, OURS)
    if not differences:
        return
    yield "## Does the controller earn its place?\n"
    yield (
        f"`{OURS}` is the null arm: a rate fixed by role and width, which falls as 1 / sqrt(step) after `rail_steps`, "
        f"the user's ignored. `{SEARCH}` is the controller, which climbs from the starting rate while gradients agree "
        "with the momentum. Pairs share task, horizon and seed; the difference is the logarithm of the loss of "
        f"`{SEARCH}` over that of `{OURS}`, so above zero the controller is worse. The interval is a 95% percentile "
        "bootstrap of the mean, the last column two one-sided t tests against a difference of 1%. Pairs of one task "
        "are not independent; the last row takes one mean for each task.\n"
    )
    groups = {"all": list(differences.values())}
    groups |= {
        f"{horizon} steps": [d for place, d in differences.items() if place[1] == horizon]
        for horizon in results.horizons
    }
    tasks = sorted({place[0] for place in differences})
    groups["means of tasks"] = [
        statistics.fmean(d for place, d in differences.items() if place[0] == task) for task in tasks
    ]
    tested = {name: compare(group) for name, group in groups.items()}
    rows = [
        [name, str(p.count), percent(p.mean), f"{percent(p.low)} to {percent(p.high)}", _equal(p)]
        for name, p in tested.items()
        if p is not None
    ]
    yield table(("pairs", "count", "mean difference", "95% interval", "within 1%"), rows)
    cells = sorted({place[:2] for place in differences})
    means = {c: statistics.fmean(d for place, d in differences.items() if place[:2] == c) for c in cells}
    if tested["all"] is not None:
        yield verdict(tested["all"], means)


def _equal(paired: Paired) -> str:
    return f"{'yes' if paired.p_equal < 0.05 else 'not shown'} (p = {paired.p_equal:.2g})"


def verdict(pairs: Paired, cells: dict[tuple[str, int], float]) -> str:
    """Says what follows: the controller is the default only where it is better and nowhere more than 2% worse."""
    worse = [f"{task} at {horizon}" for (task, horizon), mean in cells.items() if mean > math.log(NEAR)]
    ahead = pairs.high < 0
    side = "below" if ahead else "above" if pairs.low > 0 else "around"
    listed = f" ({', '.join(worse)})" if worse else ""
    found = (
        f"The mean difference over all pairs lies {side} zero, and the controller is more than 2% worse in "
        f"{len(worse)} of {len(cells)} cells{listed}. "
    )
    if ahead and not worse:
        return f"{found}The controller beats the null arm and should be the default.\n"
    return f"{found}The controller does not beat the null arm: the null arm is the default, the search opt-in.\n"


def changed(results: Results) -> Iterator[str]:
    """Yields a table of arms that differ from ours in one part, at the one starting rate that they were run at."""
    arms = [arm for arm in results.arms if arm not in (RIVAL, OURS, SEARCH) and results.log_ratios(arm, OURS)]
    if not arms:
        return
    notes, tasks = _notes(), tasks_of(results.lines)
    rows = []
    for arm in arms:
        found = results.log_ratios(arm, OURS)
        by_task = [[d for place, d in found.items() if place[0] == task] for task in tasks]
        paired = compare(list(found.values()))
        interval = f"{percent(paired.low, 1)} to {percent(paired.high, 1)}" if paired else ""
        cells = [percent(statistics.fmean(d), 1) if d else "" for d in by_task]
        rows.append([arm, notes.get(arm, ""), percent(statistics.fmean(found.values()), 1), interval, *cells])
    yield "## Ours with one part changed\n"
    yield f"Loss against `{OURS}` on the same task, horizon and seed; below zero the change is better.\n"
    yield table(("arm", "what it is", "mean", "95% interval", *tasks), rows)


def peers(results: Results) -> Iterator[str]:
    """Yields a table of other optimizers, at every rate that they were run at."""
    arms = [arm for arm in results.arms if arm not in (RIVAL, OURS, SEARCH) and not results.log_ratios(arm, OURS)]
    if not arms:
        return
    notes, columns = _notes(), results.cells()
    rows = []
    for arm in arms:
        for lr in sorted({line["lr"] for line in results.lines if line["arm"] == arm}):
            ratios = {cell: found for cell in columns if (found := results.ratios(cell, arm, lr))}
            told = [f"{task}, {horizon}: {marked(statistics.fmean(r))}" for (task, horizon), r in ratios.items()]
            rows.append([arm, notes.get(arm, ""), rate(lr), "; ".join(told)])
    yield "## Other optimizers\n"
    yield "Ratio to AdamW's best of the same seed, by task and steps.\n"
    yield table(("arm", "what it is", "starts at", "ratio"), rows)


def _notes() -> dict[str, str]:
    from .arms import ARMS  # needs torch, which the tables of AdamW, ours and the search do not

    return {name: arm.note for name, arm in ARMS.items()}
