"""Writes model_cards/OPTIMIZER.md for every registered optimizer, from the measured lines in model_cards/*.jsonl.

    python scripts/model_cards.py

A file that is new here gets a table of its own where its lines name the optimizer as `optim`.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_automagic import AutomagicConfig, get_optimizer_info, list_optimizers
from hf_automagic.reporting.card import render_optimizer_card

CARDS = Path(__file__).resolve().parents[1] / "model_cards"
PROVENANCE = ("device", "torch", "transformers", "bitsandbytes", "torchao", "commit")
Record = Mapping[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes all cards."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--lines", type=Path, default=CARDS, help="folder with the measured lines")
    parser.add_argument("--cards", type=Path, default=CARDS, help="folder for the cards")
    options = parser.parse_args(arguments)
    for name, card in render(options.lines).items():
        (options.cards / f"{name}.md").write_text(card)


def render(folder: Path) -> dict[str, str]:
    """Returns the card of each optimizer."""
    measured = {path.stem: read_lines(path) for path in sorted(folder.glob("*.jsonl"))}
    order = [*(stem for stem in SECTIONS if stem in measured), *(stem for stem in measured if stem not in SECTIONS)]
    cards = {}
    for name in list_optimizers():
        told = [SECTIONS.get(stem, plain_table(stem))(name, measured[stem]) for stem in order]
        cards[name] = render_optimizer_card(get_optimizer_info(name), [section for section in told if section])
    return cards


def read_lines(path: Path) -> list[Record]:
    """Reads the records of a file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def table(title: str, note: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lays out a section, or nothing where there is no row."""
    lines = [f"| {' | '.join(cells)} |" for cells in [heads, ["---"] * len(heads), *rows]]
    return "\n".join([f"## {title}", "", note, "", *lines]) if rows else ""


def where(record: Record) -> str:
    """Says what a line was measured with."""
    return f"{record['device']}, torch {record['torch']}, commit {record['commit']}"


def demo(name: str, records: Sequence[Record]) -> str:
    """Compares runs of the demo with AdamW's on the same device with the same seed."""
    anchors = {(r["device"], r["seed"]): r["loss"] for r in records if r["optim"] == "adamw_torch"}
    ours = [r for r in records if r["optim"] == name and (r["device"], r["seed"]) in anchors]
    rows = [
        [
            f"{r['learning_rate']:g}",
            str(r["seed"]),
            f"{r['loss']:.4f}",
            f"{r['loss'] / anchors[r['device'], r['seed']]:.3f}",
            f"{r['accuracy']:.4f}",
            f"{r['highest_true_rate']:.2e}",
            where(r),
        ]
        for r in sorted(ours, key=lambda r: (r["device"], r["seed"], r["learning_rate"]))
    ]
    note = "LoRA on rated movie sentences, see [demo.md](./demo.md); the ratio is to AdamW at 1e-3."
    heads = ("starts at", "seed", "held-out loss", "ratio", "accuracy", "highest true rate", "run on")
    return table("The demo", note, heads, rows)


def selftuning(name: str, records: Sequence[Record]) -> str:
    """Compares every start with AdamW's best rate, on each task and horizon."""
    rows = []
    for task, horizon in sorted({(r["task"], r["horizon"]) for r in records if r["arm"] == name}):
        here = with_all_starts([r for r in records if (r["task"], r["horizon"]) == (task, horizon)], name)
        ours, theirs = mean_losses(here, name), mean_losses(here, "AdamW")
        if theirs:
            best, worst_start = min(theirs.values()), max(ours, key=lambda lr: ours[lr])
            losses = [best, min(ours.values()), ours[worst_start]]
            distance = f"{100 * (ours[worst_start] / best - 1):+.1f}%"
            cells = [f"{loss:.4f}" for loss in losses]
            starts = " to ".join(f"{lr:g}" for lr in sorted({min(ours), max(ours)}))
            rows.append([task, str(horizon), starts, *cells, f"{worst_start:g}", distance])
    note = (
        "Mean held-out loss over the seeds at which all starts were run, against the best of AdamW's rates; all seeds "
        f"are in [selftuning.md](./selftuning.md); {where(records[0])}."
    )
    heads = (
        "task",
        "steps",
        "starts",
        "AdamW's best",
        "ours, best start",
        "ours, worst start",
        "which is",
        "distance",
    )
    return table("Started at any rate", note, heads, rows)


def with_all_starts(records: Sequence[Record], arm: str) -> list[Record]:
    """Keeps the seeds at which an arm was run from every start, so that all means are over the same seeds."""
    starts: dict[int, set[float]] = {}
    for record in records:
        if record["arm"] == arm:
            starts.setdefault(record["seed"], set()).add(record["lr"])
    every = set.union(*starts.values())
    return [r for r in records if starts.get(r["seed"]) == every]


def mean_losses(records: Sequence[Record], arm: str) -> dict[float, float]:
    """Returns the mean loss of an arm at each starting rate."""
    rates = {r["lr"] for r in records if r["arm"] == arm}
    return {lr: statistics.fmean(r["loss"] for r in records if r["arm"] == arm and r["lr"] == lr) for lr in rates}


def fidelity(name: str, records: Sequence[Record]) -> str:
    """Shows what 8 bits cost; the pairs are of automagic_8bit and automagic."""
    if name not in ("automagic", "automagic_8bit"):
        return ""
    rows = [
        [
            r["name"],
            str(r["seed"]),
            str(r["steps"]),
            f"{r['fp32']:.6f}",
            f"{r['stored']:.6f}",
            f"{r['difference']:+.4f}%",
        ]
        for r in records
    ]
    heads = ("states", "seed", "steps", "loss, fp32 states", "loss, states as stored", "difference")
    return table("What 8 bits cost", f"The demo, trained in pairs; {where(records[0])}.", heads, rows)


def quantization(name: str, records: Sequence[Record]) -> str:
    """Shows the error of the code that holds the momentum, beside that of others."""
    config = AutomagicConfig(**get_optimizer_info(name).options)
    if not config.quantize_states:
        return ""
    labels = (f"{config.codec} {config.block_size}", "bitsandbytes dynamic 256", "bfloat16")
    rows = [
        [r["source"], r["label"], f"{r['bytes']:.3f}", f"{r['relative_l2']:.3g}%", f"{r['update']:.3g}%"]
        for r in records
        if r["label"] in labels
    ]
    note = f"All codes are in [quantization.md](./quantization.md); {where(records[0])}."
    heads = ("momentum of", "code", "bytes an element", "relative L2 error", "displacement of the weights")
    return table("What the code takes from a momentum", note, heads, rows)


ANCHORS = ("torch AdamW fused", "bitsandbytes AdamW8bit")
SPEED = {"wall_ms": "wall ms", "gpu_ms": "GPU ms", "launches": "launches", "state_bytes": "state, bytes an element"}


def speed(name: str, records: Sequence[Record]) -> str:
    """Shows how long a step takes, beside AdamW's."""
    ours = {(r["set"], r["dtype"], r["device"]) for r in records if r["label"].startswith(f"{name}, ")}
    chosen = [
        r
        for r in records
        if (r["set"], r["dtype"], r["device"]) in ours and r["label"].startswith((f"{name}, ", *ANCHORS))
    ]
    shown = {key: head for key, head in SPEED.items() if any(key in r for r in chosen)}
    rows = [
        [r["set"], r["dtype"], r["label"], *(f"{r[key]:.3g}" if key in r else "" for key in shown), where(r)]
        for r in sorted(chosen, key=lambda r: (r["device"], r["set"], r["dtype"], r.get("wall_ms", 0)))
    ]
    note = "Medians; all rows are in [speed.md](./speed.md)."
    return table("How long a step takes", note, ("set", "dtype", "optimizer", *shown.values(), "run on"), rows)


def memory(name: str, records: Sequence[Record]) -> str:
    """Shows the promised and the measured peak of training."""
    rows = [
        [
            r["name"],
            f"{r['state'] / 2**20:,.0f} MiB",
            f"{r['promised'] / 2**20:,.0f} MiB",
            f"{r['measured'] / 2**20:,.0f} MiB",
            f"{100 * (r['promised'] / r['measured'] - 1):+.1f}%",
            where(r),
        ]
        for r in records
        if r["optim"] == name
    ]
    note = "`hf-automagic estimate` against the peak of a GPU, see [memory.md](./memory.md)."
    heads = ("run", "state", "promised peak", "measured peak", "difference", "run on")
    return table("Memory of a training run", note, heads, rows)


def plain_table(stem: str) -> Callable[[str, Sequence[Record]], str]:
    """Shows whatever a file's lines say of an optimizer."""

    def section(name: str, records: Sequence[Record]) -> str:
        ours = [r for r in records if r.get("optim") == name]
        heads = [key for key in (ours[0] if ours else {}) if key not in (*PROVENANCE, "optim")]
        rows = [[f"{r[h]:.4g}" if isinstance(r[h], float) else str(r[h]) for h in heads] + [where(r)] for r in ours]
        return table(stem.replace("_", " ").capitalize(), f"From `{stem}.jsonl`.", [*heads, "run on"], rows)

    return section


# What a file's lines become, in the order of the card.
SECTIONS: dict[str, Callable[[str, Sequence[Record]], str]] = {
    "demo": demo,
    "selftuning": selftuning,
    "speed": speed,
    "memory": memory,
    "fidelity": fidelity,
    "quantization": quantization,
}

if __name__ == "__main__":
    main()
