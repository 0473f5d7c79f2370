"""Table and plot of what benchmark_step.py measured; from its lines alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COLUMNS = {
    "wall_ms": ("wall ms", "{:.3g}"),
    "wall_span_ms": ("of all processes", "{0[0]:.3g} to {0[1]:.3g}"),
    "host_ms": ("host ms", "{:.3g}"),
    "gpu_ms": ("GPU ms", "{:.3g}"),
    "cpu_ms": ("CPU ms", "{:.3g}"),
    "launches": ("launches", "{:.0f}"),
    "syncs": ("waits", "{:.0f}"),
    "state_bytes": ("state B/p", "{:.3g}"),
    "extra_mib": ("extra MiB", "{:.0f}"),
    "bandwidth": ("TB/s", "{:.2f}"),
    "first_ms": ("first ms", "{:.0f}"),
    "step_ms": ("whole step ms", "{:.3g}"),
    "share": ("optimizer's share, %", "{:.1f}"),
    "peak_gib": ("peak GiB", "{:.2f}"),
}
OURS = ("triton", "compile", "eager")  # how our rows begin


def card(records: Sequence[Mapping[str, Any]]) -> str:
    """Writes the records as Markdown, a table for each set and dtype, fastest first."""
    parts = [
        "# How long a step takes\n",
        "`python scripts/benchmark_step.py`: every row in a fresh process, the median of its steps, each awaited; of "
        "several processes the median one, beside the span of all. "
        "Host is the time until step() returns, GPU the sum of its kernels, waits are host synchronisations a step. "
        "TB/s counts weights, gradients and states read once and written once, whatever the kernels really move. "
        "Rows that lose are printed too.\n",
    ]
    for title, rows in panels(records).items():
        first = rows[0]
        shown = {key: column for key, column in COLUMNS.items() if any(key in row for row in rows)}
        parts.append(f"## {title}\n")
        parts.append(_where(rows))
        if "elements" in first:
            copy = f", a copy moves {first['copy_bandwidth']:.2f} TB/s" if "copy_bandwidth" in first else ""
            parts.append(f"{first['tensors']} tensors, {first['elements']:,} elements{copy}.\n")
        heads = [head for head, _ in shown.values()]
        parts.append(f"| optimizer | {' | '.join(heads)} |\n|---|{'---|' * len(heads)}")
        for row in rows:
            cells = [form.format(row[key]) if key in row else "" for key, (_, form) in shown.items()]
            parts.append(f"| {row['label']} | {' | '.join(cells)} |")
        parts.append("")
    return "\n".join(parts)


def panels(records: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Sorts records into tables by set, dtype and device."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for record in sorted(records, key=lambda r: (r["device"], r["set"], r["dtype"], duration(r))):
        found.setdefault(f"{record['set']}, {record['dtype']}, {record['device']}", []).append(record)
    return found


def duration(record: Mapping[str, Any]) -> float:
    """Returns what a table is sorted by: the whole step, or the CPU's time where there is no other."""
    return record.get("step_ms", record["wall_ms"] if "gpu_ms" in record else record.get("cpu_ms", 0.0))


def _where(rows: Sequence[Mapping[str, Any]]) -> str:
    names = ("torch", "bitsandbytes", "torchao", "transformers")
    versions = [f"{name} {rows[0][name]}" for name in names if name in rows[0]]
    commits = ", ".join(sorted({row["commit"] for row in rows}))
    return f"{', '.join(versions)}, commit {commits}.\n"


def draw(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plots the durations as bars, one panel for each table, on a logarithmic axis."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tables = panels(records)
    heights = [0.8 + 0.28 * len(rows) for rows in tables.values()]
    figure, axes = plt.subplots(
        len(tables), 1, figsize=(9, sum(heights)), squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    for axis, (title, rows) in zip(axes[:, 0], tables.items(), strict=True):
        colors = ["C0" if row["row"].startswith(OURS) else "C7" for row in rows[::-1]]
        bars = axis.barh([row["label"] for row in rows[::-1]], [duration(row) for row in rows[::-1]], color=colors)
        axis.bar_label(bars, fmt="%.3g", padding=3, fontsize=8)
        axis.set(title=title, xscale="log", xlabel="ms a step")
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=90, metadata={"Software": None})
    plt.close(figure)
