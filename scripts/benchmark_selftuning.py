"""Measures how well one setting serves every task and every starting rate, against tuned rivals and the null arm.

    python scripts/benchmark_selftuning.py prepare                                  # data and bases
    python scripts/benchmark_selftuning.py run --stages proof starts parts peers    # goes on where it was cut
    python scripts/benchmark_selftuning.py publish                                  # lines without their curves
    python scripts/benchmark_selftuning.py report                                   # selftuning.md and its plot

`publish` and `report` need no GPU, `report` nothing but the published lines.
"""

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path

from selftuning.lines import publish

CACHE = Path(".cache/selftuning")


def main(arguments: Sequence[str] | None = None) -> None:
    """Prepares, runs, publishes or reports."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("what", choices=VERBS)
    parser.add_argument("--data", type=Path, default=CACHE, help="folder of arrays and bases")
    parser.add_argument("--stages", nargs="+", default=["small"], help="in the order they are run")
    parser.add_argument("--runs", type=Path, nargs="+", default=[CACHE / "runs.jsonl"], help="what `run` writes")
    parser.add_argument("--results", type=Path, default=Path("model_cards/selftuning.jsonl"), help="what is published")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--slots", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=540)
    options = parser.parse_args(arguments)
    print(VERBS[options.what](options))


def _prepare(options: argparse.Namespace) -> str:
    import torch
    from selftuning.data import prepare
    from selftuning.pretrain import pretrain

    prepare(options.data, options.data.parent)
    pretrain(options.data, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return f"data and bases are in {options.data}"


def _run(options: argparse.Namespace) -> str:
    from provenance import provenance
    from selftuning.grid import STAGES, run_grid, stage

    if unknown := set(options.stages) - STAGES.keys():
        raise SystemExit(f"--stages are of {', '.join(STAGES)}, got {', '.join(sorted(unknown))}")
    given = {"processes": options.processes, "slots": options.slots, "seconds": options.seconds}
    jobs = itertools.chain.from_iterable(stage(name) for name in options.stages)
    added = run_grid(jobs, options.data, options.runs[0], **given, origin=provenance())
    return f"{added} runs added to {options.runs[0]}"


def _publish(options: argparse.Namespace) -> str:
    return f"{publish(options.runs, options.results)} runs added to {options.results}"


def _report(options: argparse.Namespace) -> str:
    from selftuning.report import write_report

    return write_report(options.results)


VERBS = {"prepare": _prepare, "run": _run, "publish": _publish, "report": _report}

if __name__ == "__main__":
    main()
