"""Measures what each code takes from a momentum, beside bitsandbytes' and torchao's, for model_cards/quantization.md.

    python scripts/benchmark_quantization.py                # on the demo's LoRA gradients and on heavy-tailed noise
    python scripts/benchmark_quantization.py --redraw       # table and plot again, from the lines that are there

One-shot figures are of the momenta at the end of the run, each stored once. The last column is what training feels:
the gradients are fed again to optimizers that keep their momentum in each code, and the distance is taken between
where the weights went and where they went with fp32 states, relative to how far they went.
"""

import argparse
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import peer_codecs  # noqa: F401  registers "bfloat16" and "torchao"
import torch
from provenance import provenance
from torch import Tensor

from hf_automagic import Automagic
from hf_automagic.quantization import Codec, WithFeedback, make_codec
from hf_automagic.quantization.core import split_blocks

ROOT = Path(__file__).resolve().parents[1]
Gradients = list[list[Tensor]]  # of each step, of each matrix


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to store a momentum."""

    codec: str
    block_size: int = 128
    error_correction: bool = False

    @property
    def label(self) -> str:
        """Names it in table and plot."""
        name = {"dynamic": "bitsandbytes dynamic"}.get(self.codec, self.codec)
        block = "" if self.codec == "bfloat16" else f" {self.block_size}"
        return f"{name}{block}{' + feedback' if self.error_correction else ''}"

    def build(self) -> Codec:
        """Makes the codec."""
        codec = make_codec(self.codec, self.block_size)
        return WithFeedback(codec, 100) if self.error_correction else codec


ARMS = [
    *(Arm("softsign", size) for size in (32, 64, 128, 256)),
    *(Arm("affine", size) for size in (128, 256)),
    *(Arm("dynamic", size) for size in (128, 256, 2048)),
    Arm("torchao", 256),
    Arm("softsign", 128, error_correction=True),
    Arm("affine", 256, error_correction=True),
    Arm("bfloat16"),
]
OURS = ("softsign", "affine")  # colored in the plot
COLUMNS = {
    "bytes": "bytes an element",
    "relative_l2": "relative L2, %",
    "median": "median, %",
    "worst_block": "worst block, %",
    "update": "displacement, %",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Records, measures, writes the lines, the table and the plot."""
    options = parse_options(arguments)
    lines = options.output_dir / "quantization.jsonl"
    options.output_dir.mkdir(parents=True, exist_ok=True)
    if not options.redraw:
        records = [record for name in options.sources for record in measure_source(name, options)]
        lines.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    records = read_lines(lines)
    (options.output_dir / "quantization.md").write_text(table(records))
    draw(records, options.output_dir / "quantization.png")
    print(table(records))


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--sources", nargs="+", default=list(SOURCES), choices=list(SOURCES), help="where gradients come from")
    add("--steps", type=int, default=60, help="steps recorded and fed again")
    add("--rank", type=int, default=16, help="LoRA rank of the recorded run")
    add("--batch_size", type=int, default=16, help="sentences a step of the recorded run")
    add("--cache_dir", type=Path, default=ROOT / ".cache", help="has, or gets, the movie sentences")
    add("--output_dir", type=Path, default=ROOT / "model_cards", help="where the three files go")
    add("--redraw", action="store_true", help="measure nothing, read the lines that are there")
    return parser.parse_args(arguments)


def record_lora(options: argparse.Namespace) -> Gradients:
    """Trains the demo's LoRA on movie sentences with fp32 states and keeps the gradients of its large matrices."""
    import finetune_lora as demo
    from datasets import disable_progress_bars
    from sentences import load_movie_sentences, order_by_length
    from transformers import DataCollatorWithPadding
    from transformers.utils import logging

    disable_progress_bars()
    logging.set_verbosity_error()  # else it says that the head is new, which it should be
    settings = demo.parse_options(["--rank", str(options.rank), "--max_steps", str(options.steps)])
    torch.manual_seed(settings.seed)
    data = load_movie_sentences(options.cache_dir)
    tokenizer, model = demo.build_model(settings, data["train"].features["label"])
    rows = demo.tokenize(data["train"], tokenizer, settings.max_length)
    order = order_by_length(rows["length"], options.batch_size, options.steps, settings.seed)
    rows = rows.select(order).remove_columns(["text", "length"])
    collate = DataCollatorWithPadding(tokenizer)
    params = [p for name, p in model.named_parameters() if p.requires_grad and "lora" in name and p.numel() >= 4096]
    optimizer = Automagic([p for p in model.parameters() if p.requires_grad], quantize_states=False)
    gradients: Gradients = []
    model.train()
    for start in range(0, len(rows), options.batch_size):
        batch = collate([rows[i] for i in range(start, start + options.batch_size)])
        model(**batch).loss.backward()
        gradients.append([p.grad.clone() for p in params if p.grad is not None])
        optimizer.step()
        optimizer.zero_grad()
    return gradients


def record_noise(options: argparse.Namespace) -> Gradients:
    """Draws gradients of Student's t with 2 degrees of freedom around a small mean, elements spread over a decade."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(3, 4, 64, 1024, generator=generator)
    spread, mean = (1.2 * normal[0]).exp(), 0.2 * normal[1]

    def student() -> Tensor:
        draws = torch.randn(3, 4, 64, 1024, generator=generator)
        return draws[0] / draws[1:].square().mean(0).sqrt()

    return [list(((mean + student()) * spread).unbind()) for _ in range(options.steps)]


SOURCES = {"lora": record_lora, "noise": record_noise}
SOURCE_NAMES = {"lora": "MiniLM LoRA on movie sentences", "noise": "heavy-tailed noise"}


def measure_source(source: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yields one record for each arm that can run."""
    gradients = SOURCES[source](options)
    exact, momenta = replay(gradients, {"quantize_states": False})
    for arm in ARMS:
        if arm.codec == "torchao" and find_spec("torchao") is None:
            continue
        storage = {"codec": arm.codec, "block_size": arm.block_size, "error_correction": arm.error_correction}
        went, _ = replay(gradients, {**storage, "strict": True, "vector_precision": "fp32"})
        yield {
            "source": SOURCE_NAMES[source],
            "label": arm.label,
            **storage,
            **one_shot(arm.build(), momenta),
            "update": 100 * distance(went, exact),
            "steps": options.steps,
            "elements": sum(m.numel() for m in momenta),
            **provenance(),
        }


def replay(gradients: Gradients, storage: Mapping[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """Feeds gradients to an optimizer with a fixed rate; returns where weights went, and fp32 momenta if there are."""
    params = [torch.nn.Parameter(torch.zeros_like(g)) for g in gradients[0]]
    optimizer = Automagic(params, lr=1e-3, self_tuning=False, **storage)
    for step in gradients:
        for param, grad in zip(params, step, strict=True):
            param.grad = grad
        optimizer.step()
    momenta = [optimizer.state[p]["exp_avg"].clone() for p in params if "exp_avg" in optimizer.state[p]]
    return [p.detach() for p in params], momenta


def one_shot(codec: Codec, momenta: Sequence[Tensor]) -> dict[str, float]:
    """Stores each momentum once and measures, in percent."""
    stored = [codec.encode(m[None]) for m in momenta]
    read = [codec.decode(fields)[0] for fields in stored]
    relative = torch.cat([((r - m).abs() / m.abs())[m != 0] for r, m in zip(read, momenta, strict=True)])
    worst = [
        ((r - m).norm(dim=-1) / m.norm(dim=-1).clamp_min(1e-30)).max()
        for r, m in zip(map(pieces, read), map(pieces, momenta), strict=True)
    ]
    size = sum(t.numel() * t.element_size() for fields in stored for t in fields.values())
    return {
        "bytes": size / sum(m.numel() for m in momenta),
        "relative_l2": 100 * sum(distance([r], [m]) for r, m in zip(read, momenta, strict=True)) / len(momenta),
        "median": 100 * float(relative.median()),
        "worst_block": 100 * float(torch.stack(worst).max()),
    }


def pieces(values: Tensor) -> Tensor:
    """Cuts rows into pieces of up to 64 elements, the same for every code  # [..., n, 64]"""
    return split_blocks(values, 64)


def distance(values: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Returns the L2 distance of lists of tensors, relative to the second."""
    difference = sum(float((v - e).double().square().sum()) for v, e in zip(values, exact, strict=True))
    return (difference / sum(float(e.double().square().sum()) for e in exact)) ** 0.5


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Reads the records."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """Writes the records as Markdown, one table a source."""
    first = records[0]
    versions = ", ".join(f"{name} {first[name]}" for name in ("torch", "bitsandbytes", "torchao") if name in first)
    parts = [
        "# What each code takes from a momentum\n",
        f"`python scripts/benchmark_quantization.py`, {first['device']}, {versions}, commit {first['commit']}.\n",
        "One-shot errors of the momenta after the last step, and the displacement: how far weights end from where "
        "fp32 states bring them, with a fixed rate.\n",
    ]
    for source in dict.fromkeys(record["source"] for record in records):
        rows = [record for record in records if record["source"] == source]
        parts.append(f"## {source}: {rows[0]['steps']} steps, {rows[0]['elements']:,} elements\n")
        parts.append(f"| code | {' | '.join(COLUMNS.values())} |\n|---|{'---|' * len(COLUMNS)}")
        parts += [
            f"| {r['label']} | {r['bytes']:.3f} | {' | '.join(f'{r[c]:.3g}' for c in list(COLUMNS)[1:])} |"
            for r in rows
        ]
        parts.append("")
    return "\n".join(parts)


def draw(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plots the errors as bars, one panel for each source and kind of error."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sources = list(dict.fromkeys(record["source"] for record in records))
    figure, axes = plt.subplots(2, len(sources), figsize=(7 * len(sources), 8.5), squeeze=False)
    for column, source in enumerate(sources):
        rows = [record for record in records if record["source"] == source][::-1]
        labels = [f"{r['label']} ({r['bytes']:.2f} B)" for r in rows]
        colors = ["C0" if r["codec"] in OURS else "C7" for r in rows]
        for axis, key in zip(axes[:, column], ("relative_l2", "update"), strict=True):
            bars = axis.barh(labels, [r[key] for r in rows], color=colors)
            axis.bar_label(bars, fmt="%.2g", padding=3, fontsize=8)
            axis.set(title=source, xlabel=COLUMNS[key])
            axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
