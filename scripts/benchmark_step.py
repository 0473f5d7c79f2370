"""Times the step of our backends beside its peers', for model_cards/speed.md.

    python scripts/benchmark_step.py                              # all sets and rows of this machine
    python scripts/benchmark_step.py --sets LORA --dtypes bf16 --rows triton adamw_fused
    python scripts/benchmark_step.py --end_to_end llama-1b        # whole training steps of a PEFT model
    python scripts/benchmark_step.py --redraw                     # table and plot again, from the lines that are there

Every row runs in a fresh process, and first has to move weights as its reference does. A host that others share is
twice as fast in one minute as in the next: `--processes 5` takes the rows in turns and keeps the median process of
each. A line that is measured again replaces the older one of the same key.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from benchmark_sets import DTYPES, SETS
from provenance import provenance
from speed_card import card, draw
from step_rows import ROWS

ROOT = Path(__file__).resolve().parents[1]
KEY = ("set", "dtype", "row", "device")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures one row, or starts a process for each and writes what they say."""
    options = parse_options(arguments)
    if options.row:
        print(json.dumps(measure_here(options)))
        return
    lines = options.output_dir / "speed.jsonl"
    options.output_dir.mkdir(parents=True, exist_ok=True)
    if not options.redraw:
        found: dict[tuple[str, ...], list[dict[str, Any]]] = {}
        for what in plan(options) * options.processes:
            record = run_row(*what)
            if record is not None:
                same = found.setdefault(tuple(record[key] for key in KEY), [])
                same.append(record)
                keep(typical(same), lines)
    records = read_lines(lines)
    (options.output_dir / "speed.md").write_text(card(records))
    draw(records, options.output_dir / "speed.png")
    print(card(records))


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    sets = [name for name in SETS if name != "CPU96"] if on_gpu else ["CPU96"]
    add("--sets", nargs="+", default=sets, choices=list(SETS), help="shapes")
    add("--dtypes", nargs="+", default=list(DTYPES) if on_gpu else ["fp32"], choices=list(DTYPES))
    add(
        "--rows",
        nargs="+",
        default=list(ROWS),
        choices=list(ROWS),
        help="optimizers; those not there are left out",
    )
    add("--device", default="cuda" if on_gpu else "cpu", choices=("cuda", "cpu"))
    add("--threads", type=int, default=1, help="torch threads on the CPU")
    add("--steps", type=int, default=50, help="steps timed")
    add("--processes", type=int, default=1, help="fresh processes a row, in turns; the median one counts")
    add("--timeout", type=float, default=600, help="seconds that a row may take")
    add("--end_to_end", metavar="MODEL", help="a model's folder, or llama-1b: time whole training steps instead")
    add("--output_dir", type=Path, default=ROOT / "model_cards", help="where the three files go")
    add("--redraw", action="store_true", help="measure nothing, read the lines that are there")
    add("--row", choices=list(ROWS), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def plan(options: argparse.Namespace) -> list[tuple[argparse.Namespace, str, str, str]]:
    """Lists what is to be measured; full weights in fp32 are left out, as nobody trains so with 8 bits of state."""
    if options.end_to_end:
        from step_end_to_end import ARMS

        return [(options, options.end_to_end, "bf16", row) for row in ARMS if row in options.rows]
    rows = [row for row in options.rows if ROWS[row].is_there(options.device)]
    return [
        (options, name, dtype, row)
        for name in options.sets
        for dtype in options.dtypes
        for row in rows
        if (name, dtype) != ("FULL1B", "fp32")
    ]


def run_row(options: argparse.Namespace, name: str, dtype: str, row: str) -> dict[str, Any] | None:
    """Measures one row in a fresh process; None, and a line that says why, where it fails."""
    what = ["--end_to_end", name] if options.end_to_end else ["--sets", name]
    command = [sys.executable, __file__, "--row", row, *what, "--dtypes", dtype, "--device", options.device]
    command += ["--steps", str(options.steps), "--threads", str(options.threads)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=options.timeout, check=False
        )
    except subprocess.TimeoutExpired:
        print(f"{name} {dtype} {row}: took longer than {options.timeout:g} s", file=sys.stderr)
        return None
    if done.returncode:
        print(f"{name} {dtype} {row}: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
        return None
    record = json.loads(done.stdout.strip().splitlines()[-1])
    print({key: record[key] for key in (*KEY, "wall_ms", "gpu_ms", "host_ms", "launches") if key in record})
    return record


def measure_here(options: argparse.Namespace) -> dict[str, Any]:
    """Measures in this process."""
    torch.set_num_threads(options.threads)
    dtype, row = options.dtypes[0], ROWS[options.row]
    if options.end_to_end:
        from step_end_to_end import measure_training

        name, figures = f"training {Path(options.end_to_end).name}", measure_training(options, options.row)
    else:
        from step_measure import measure

        name, figures = options.sets[0], measure(row, options.sets[0], dtype, options.device, options.steps)
    key = {"set": name, "dtype": dtype, "row": options.row, "label": row.label}
    return {**key, **figures, "steps": options.steps, **provenance()}


def typical(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the record of the median process of a row, with the span of all of them."""
    ordered = sorted(records, key=lambda record: record["wall_ms"])
    middle, span = ordered[(len(ordered) - 1) // 2], [ordered[i]["wall_ms"] for i in (0, -1)]
    return middle if len(ordered) == 1 else {**middle, "wall_span_ms": span, "processes": len(ordered)}


def keep(record: Mapping[str, Any], path: Path) -> None:
    """Adds a line; one of the same key makes room."""
    records = read_lines(path) if path.exists() else []
    kept = [r for r in records if any(r[key] != record[key] for key in KEY)]
    path.write_text("".join(f"{json.dumps(r)}\n" for r in [*kept, record]))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Reads the records."""
    return [json.loads(line) for line in path.read_text().splitlines()]


if __name__ == "__main__":
    main()
