"""Measures how well one setting serves every task and every starting rate, against tuned rivals and the null arm."""

import argparse
import itertools
from pathlib import Path

import torch
from provenance import provenance
from selftuning.grid import STAGES, run_grid, stage


def main() -> None:
    """Prepares, runs or reports."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("prepare", "run"))
    parser.add_argument("--data", type=Path, default=Path(".cache/selftuning"), help="folder of arrays and bases")
    parser.add_argument("--stages", choices=STAGES, nargs="+", default=["small"], help="in the order they are run")
    parser.add_argument("--results", type=Path, default=Path("model_cards/selftuning.jsonl"))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--slots", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=540)
    arguments = parser.parse_args()
    if arguments.what == "prepare":
        from selftuning.data import prepare
        from selftuning.pretrain import pretrain

        prepare(arguments.data, arguments.data.parent)
        pretrain(arguments.data, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    else:
        options = {"processes": arguments.processes, "slots": arguments.slots, "seconds": arguments.seconds}
        jobs = itertools.chain.from_iterable(stage(name) for name in arguments.stages)
        added = run_grid(jobs, arguments.data, arguments.results, **options, origin=provenance())
        print(f"{added} runs added to {arguments.results}")


if __name__ == "__main__":
    main()
