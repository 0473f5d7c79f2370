"""Trains the demo with fp32 states and with states in few bits, seed by seed: what does storage cost?

    python scripts/benchmark_fidelity.py                                     # three seeds of automagic_8bit
    python scripts/benchmark_fidelity.py --optim_args vector_precision=log16 --name log16

Both runs of a pair see the same batches, head and dropout. Losses are those of the held-out sentences after the last
step. Lines go to model_cards/fidelity.jsonl; those of other names stay there.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import finetune_lora as demo
from benchmark_quantization import ROOT, read_lines
from datasets import DatasetDict, disable_progress_bars
from provenance import provenance
from sentences import load_movie_sentences
from transformers.utils import logging


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains every pair, writes its line and prints the table."""
    options = parse_options(arguments)
    disable_progress_bars()
    logging.set_verbosity_error()  # else it says that the head is new, which it should be
    data = load_movie_sentences(options.cache_dir)
    records = [measure(seed, options, data) for seed in options.seeds]
    lines = options.output_dir / "fidelity.jsonl"
    options.output_dir.mkdir(parents=True, exist_ok=True)
    others = [record for record in read_lines(lines) if record["name"] != options.name] if lines.exists() else []
    lines.write_text("".join(f"{json.dumps(record)}\n" for record in others + records))
    print(table(others + records))


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--name", default="default", help="what the lines are called")
    add("--optim_args", help="options of the optimizer whose states are in few bits")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="each a pair of runs")
    add("--max_steps", type=int, default=80, help="optimizer steps")
    add("--batch_size", type=int, default=16, help="sentences a step")
    add("--rank", type=int, default=16, help="LoRA rank; below 11 most matrices are too small for 8 bits")
    add("--cache_dir", type=Path, default=ROOT / ".cache", help="has, or gets, the movie sentences")
    add("--run_dir", type=Path, default=Path("runs/fidelity"), help="where the adapters go")
    add("--output_dir", type=Path, default=ROOT / "model_cards", help="where the lines go")
    return parser.parse_args(arguments)


def measure(seed: int, options: argparse.Namespace, data: DatasetDict) -> dict[str, Any]:
    """Trains with both kinds of states from one seed."""
    exact = final_loss("automagic", None, seed, options, data)
    stored = final_loss("automagic_8bit", options.optim_args, seed, options, data)
    run = {"name": options.name, "optim_args": options.optim_args, "seed": seed, "steps": options.max_steps}
    return {**run, "fp32": exact, "stored": stored, "difference": 100 * (stored / exact - 1), **provenance()}


def final_loss(optim: str, optim_args: str | None, seed: int, options: argparse.Namespace, data: DatasetDict) -> float:
    """Returns the loss on held-out sentences at the end of one run."""
    arguments = ["--optim", optim, "--seed", str(seed), "--output_dir", str(options.run_dir)]
    arguments += ["--max_steps", str(options.max_steps), "--batch_size", str(options.batch_size)]
    arguments += ["--rank", str(options.rank), *(["--optim_args", optim_args] if optim_args else [])]
    return demo.finetune(demo.parse_options(arguments), data).after["eval_loss"]


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """Lays the pairs out."""
    head = f"{'states':24}{'seed':>6}{'steps':>7}{'loss, fp32':>14}{'loss, stored':>14}{'difference, %':>16}"
    rows = [
        f"{r['name']:24}{r['seed']:>6}{r['steps']:>7}{r['fp32']:>14.6f}{r['stored']:>14.6f}{r['difference']:>+16.4f}"
        for r in records
    ]
    return "\n".join([head, *rows])


if __name__ == "__main__":
    main()
