"""Writes the report of the self-tuning benchmark from its lines alone: tables in Markdown, the plot beside them."""

import math
import shutil
import statistics
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from .lines import Line, read_lines
from .measures import ANY, GOAL, NEAR, OURS, RIVAL, SEARCH, Results, decades_within, diverged
from .versus import changed, null_arm, peers
from .wording import TASKS, marked, rate, span, table, tasks_of

ROOT = Path(__file__).resolve().parents[2]
# what decides where a run of ours ends; a change of it makes lines stale
DECIDING = tuple(
    f"hf_automagic/{path}"
    for path in ("transforms", "kernels", "optim/groups.py", "optim/roles.py", "optim/freshness.py", "peft.py")
)
STARTS = (300, 0)  # horizon and seed at which every starting rate was run


def write_report(results: Path) -> str:
    """Writes report and plot beside the lines; returns what is for the screen alone."""
    from .plot import draw

    lines = read_lines(results)
    results.with_suffix(".md").write_text("\n".join(render(lines)))
    draw(Results(lines), *STARTS, results.with_suffix(".png"))
    return "\n".join([f"{len(lines)} runs", *stale(lines)])


def render(lines: Sequence[Line]) -> Iterator[str]:
    """Yields the report in pieces, each ended by a blank line where Markdown wants one."""
    results = Results(lines)
    yield "# One setting for every task and every starting rate\n"
    yield from _what_was_run(lines)
    yield from _goal(results)
    yield from _cells(results)
    yield from _starting_rates(results)
    yield from null_arm(results)
    yield from changed(results)
    yield from peers(results)


def stale(lines: Iterable[Line]) -> Iterator[str]:
    """Yields a sentence for each commit since which the code that decides a run has changed; needs git."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        return
    commits = [line["commit"] for line in lines]
    for commit in dict.fromkeys(commits):
        command = ["git", "diff", "--quiet", commit, "--", *DECIDING]
        code = subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode
        if code:
            told = "is not in this history" if code > 1 else f"is older than the last change in {', '.join(DECIDING)}"
            yield f"stale: {commits.count(commit)} runs are of commit {commit}, which {told}"


def _what_was_run(lines: Sequence[Line]) -> Iterator[str]:
    def values(name: str) -> str:
        return ", ".join(dict.fromkeys(str(line[name]) for line in lines if name in line))

    seeds, horizons = (", ".join(map(str, sorted({line[name] for line in lines}))) for name in ("seed", "horizon"))
    yield (
        "`python scripts/benchmark_selftuning.py report` makes this page and its plot from "
        "[selftuning.jsonl](./selftuning.jsonl); `prepare`, `run` and `publish` make the lines. The curves and rates "
        "of the runs are left out of the published lines; no figure here needs them.\n"
    )
    yield (
        f"{len(lines)} runs on {values('device')}, torch {values('torch')}, transformers {values('transformers')}, "
        f"commit {values('commit')}. Batches of 32, TF32, gradients clipped at norm 1, 5% of warm-up, then a cosine "
        f"to zero, no weight decay; {horizons} steps, seeds {seeds}. A seed fixes fresh weights and the order of the "
        "batches for all arms alike. The measure is the held-out loss after the last step.\n"
    )
    yield (
        "The rates by role and their fall were chosen on earlier runs of these same tasks, and so were the rates at "
        "which AdamW is run with more than one seed: a task that was not seen can lie further off than any here.\n"
    )
    yield "".join(f"- `{name}`: {TASKS.get(name, 'not described')}\n" for name in tasks_of(lines))
    lost = diverged(lines)
    listed = "".join(f"- {line['key'].replace('|', ', ')}\n" for line in lost)
    yield (
        "No run ended in a loss that is not finite.\n"
        if not lost
        else (
            f"{len(lost)} runs ended in a loss that is not finite; each counts as the highest finite loss of its task "
            f"and horizon:\n\n{listed}"
        )
    )


def _goal(results: Results) -> Iterator[str]:
    yield "## The goal\n"
    yield (
        "On every task and horizon within 5% of the best of AdamW's rates, from any starting rate, with none "
        'diverged; with no argument but `optim="automagic_8bit"` within 2%. A ratio is to the best AdamW run of the '
        "same seed, chosen after the fact, which favours AdamW where seeds are noisy.\n"
    )
    yield table(("arm", *GOAL_HEADS), [[arm, *_met(results, arm)] for arm in (OURS, SEARCH)])


GOAL_HEADS = (
    *("at or below AdamW's best", "within 2%", "within 5%", "worst cell"),
    *("other starts within 5%", "diverged", "met"),
)


def _met(results: Results, arm: str) -> Iterator[str]:
    """Yields the row of an arm: means over seeds of what was run with no argument, then each other starting rate."""
    means = {cell: statistics.fmean(found) for cell in results.cells() if (found := results.ratios(cell, arm))}
    counts = {limit: sum(mean <= limit for mean in means.values()) for limit in (1.0, NEAR, GOAL)}
    yield from (f"{count} of {len(means)}" for count in counts.values())
    cell = max(means, key=lambda cell: means[cell], default=None)
    yield f"{cell[0]}, {cell[1]} steps: {means[cell]:.3f}" if cell else ""
    others = [ratio for place in results.places() for lr, ratio in results.starts(place, arm).items() if lr != ANY]
    held = sum(ratio <= GOAL for ratio in others)
    yield f"{held} of {len(others)}"
    lost = len(diverged(line for line in results.lines if line["arm"] == arm))
    yield str(lost)
    yield "yes" if counts[NEAR] == len(means) and held == len(others) and not lost else "no"


def _cells(results: Results) -> Iterator[str]:
    yield "## Every task and horizon\n"
    yield (
        f"`{OURS}` with no argument, `{SEARCH}` started at {rate(ANY)}: mean (lowest to highest) over seeds of the "
        "ratio to AdamW's best. Bold misses 5%. A star: the rate is the lowest or highest that was run there, so that "
        "AdamW's best may be better still.\n"
    )
    rows = []
    for task, horizon in results.cells():
        bests = [best for place in results.places((task, horizon)) if (best := results.best(place))]
        run = results.rates((task, horizon), RIVAL)
        rates = ", ".join(rate(lr) + "*" * (lr in (run[0], run[-1])) for lr in sorted({lr for lr, _ in bests}))
        row = [task, str(horizon), rates, f"{statistics.fmean(loss for _, loss in bests):.4f}"]
        for arm in (OURS, SEARCH):
            ratios = results.ratios((task, horizon), arm)
            row.append(f"{marked(statistics.fmean(ratios))} ({span(ratios)})" if ratios else "")
        rows.append(row)
    yield table(("task", "steps", "AdamW's best rate", "its loss, mean over seeds", OURS, SEARCH), rows)


def _starting_rates(results: Results) -> Iterator[str]:
    horizon, seed = STARTS
    yield f"## Every starting rate: seed {seed}, {horizon} steps\n"
    yield "![Loss against starting rate](./selftuning.png)\n"
    yield "Ratio to AdamW's best; bold is more than 5% above it, an empty cell was not run.\n"
    ratios = {(task, arm): results.starts((task, horizon, seed), arm) for task in tasks_of(results.lines)
              for arm in (RIVAL, OURS, SEARCH)}  # fmt: skip
    for arms in ((RIVAL,), (OURS, SEARCH)):
        shown = {key: found for key, found in ratios.items() if key[1] in arms and found}
        rates = sorted({lr for found in shown.values() for lr in found})
        rows = [[*key, *(marked(f[lr]) if lr in f else "" for lr in rates)] for key, f in shown.items()]
        yield table(("task", "arm", *map(rate, rates)), rows)
    yield (
        "Width: over how many decades of the starting rate the loss stays within 5% of AdamW's best, of the decades "
        "that were run; log-linear between neighbours.\n"
    )
    rows = []
    for task in tasks_of(results.lines):
        row = [task]
        for arm in (RIVAL, OURS, SEARCH):
            found = ratios[task, arm]
            run = math.log10(max(found) / min(found)) if len(found) > 1 else 0.0
            row.append(f"{decades_within(found):.1f} of {run:.1f}" if run else "")
        same = ratios[task, OURS].values()
        rows.append([*row, f"{100 * (max(same) / min(same) - 1):.1f}%" if len(same) > 1 else ""])
    yield table(("task", RIVAL, OURS, SEARCH, f"spread of {OURS}"), rows)
    yield (
        f"`{OURS}` does not use the starting rate, so its runs from different ones are the same run; the last column "
        "is how far apart they end, highest over lowest. Where it is not near zero, the model's own dropout, drawn "
        "anew in each run, makes the difference: smaller distances there say nothing.\n"
    )
