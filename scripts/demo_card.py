"""Writes model_cards/demo.md from the recorded runs of the demo.

python scripts/finetune_lora.py --baseline --record model_cards/demo.jsonl
python scripts/demo_card.py
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

CARDS = Path(__file__).resolve().parent.parent / "model_cards"
ANCHOR = "adamw_torch"
HEAD = """# The demo: LoRA on rated movie sentences

all-MiniLM-L6-v2, LoRA rank 8 on every linear layer but the pooler and a new head, {steps} steps of 32 sentences, 5%
warm-up, then cosine, 1,500 sentences held out; `scripts/finetune_lora.py`. Each row is one run; the ratio is its
held-out loss over that of AdamW at 1e-3 on the same device with the same seed. On the GPU the base model's weights had
been rounded to float16 and back.

| optimizer | starts at | seed | held-out loss | ratio | accuracy | highest true rate | run on |
|---|---|---|---|---|---|---|---|
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the lines and writes the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--lines", type=Path, default=CARDS / "demo.jsonl")
    parser.add_argument("--card", type=Path, default=CARDS / "demo.md")
    options = parser.parse_args(arguments)
    options.card.write_text(render([json.loads(line) for line in options.lines.read_text().splitlines()]))


def render(runs: Sequence[Mapping[str, Any]]) -> str:
    """Lays the runs out as a table, the anchor of each seed first."""
    anchors = {place(run): run["loss"] for run in runs if run["optim"] == ANCHOR}
    order = sorted(runs, key=lambda run: (*place(run), run["optim"] != ANCHOR, run["optim"], run["learning_rate"]))
    rows = [
        f"| {run['optim']} | {run['learning_rate']:g} | {run['seed']} | {run['loss']:.4f} "
        f"| {run['loss'] / anchors[place(run)]:.3f} | {run['accuracy']:.4f} | {run['highest_true_rate']:.2e} "
        f"| {run['device']}, torch {run['torch']}, commit {run['commit']} |"
        for run in order
        if place(run) in anchors
    ]
    return HEAD.format(steps=max(run["steps"] for run in runs)) + "\n".join(rows) + "\n"


def place(run: Mapping[str, Any]) -> tuple[str, int]:
    """Names what a run and its anchor share: the device and the seed."""
    return run["device"], run["seed"]


if __name__ == "__main__":
    main()
