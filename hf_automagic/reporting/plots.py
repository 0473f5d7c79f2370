"""Plots of a run as PNG files, legible at 600 pixels, each in a light and a dark version."""

import dataclasses
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from .snapshot import role_key
from .stats import RunRecord, replaced

Theme = Literal["light", "dark"]

KINDS = {"A": "LoRA A", "B": "LoRA B", "adapter": "adapter", "new": "new modules", "full": "full weights"}
RAIL_DASHES = ((0, (6, 4)), (0, (6, 3, 1, 3)), (0, (2, 3)))  # for as many pairs of rails as roles bring
DECADES = 1e6  # between the highest and the lowest rate shown where there are no rails
SIZE, DPI = (7.5, 4.2), 120  # 900 x 504 pixels: 11 pt is still 9 pixels high when shown at 600


@dataclasses.dataclass(frozen=True)
class Palette:
    """Colours of one theme; the hues are Okabe and Ito's, which colour-blind readers tell apart.

    Args:
        paper: background.
        ink: text and axes.
        faint: grid, rails and the schedule.
        hues: of the lines, in order.
        alarm: events.
    """

    paper: str
    ink: str
    faint: str
    hues: tuple[str, ...]
    alarm: str


PALETTES: dict[Theme, Palette] = {
    "light": Palette(
        paper="#ffffff",
        ink="#1f2328",
        faint="#8c959f",
        hues=("#0072b2", "#d55e00", "#009e73", "#aa4499", "#7a5c00"),
        alarm="#cf222e",
    ),
    "dark": Palette(
        paper="#0d1117",
        ink="#e6edf3",
        faint="#7d8590",
        hues=("#56b4e9", "#e69f00", "#3fcf9f", "#dd88cc", "#f0e442"),
        alarm="#ff7b72",
    ),
}


def draw_plots(record: RunRecord, folder: str | os.PathLike[str]) -> list[Path]:
    """Draws every plot that the run has something for, as `NAME.png` and `NAME_dark.png`.

    Args:
        record: the run.
        folder: where the files go.

    Returns:
        The light versions, in the order in which a reader wants them.

    Raises:
        ImportError: matplotlib is not installed.
    """
    new_figure = figure_class()
    drawn = []
    for name, (has_content, draw) in PLOTS.items():
        if has_content(record):
            for theme, palette in PALETTES.items():
                path = Path(folder) / f"{name}{'' if theme == 'light' else '_dark'}.png"
                with _styled(palette), replaced(path) as file:
                    figure = new_figure(figsize=SIZE, dpi=DPI, layout="constrained")
                    draw(record, figure.add_subplot(), palette)
                    figure.savefig(file, format="png", metadata={"Software": None})
            drawn.append(Path(folder) / f"{name}.png")
    return drawn


def figure_class() -> Any:
    """Returns matplotlib's Figure, which draws with Agg and touches no display and no global figure list."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib; pip install hf_automagic[plot]") from error
    return Figure


@contextmanager
def _styled(palette: Palette) -> Iterator[None]:
    import matplotlib

    colours: dict[Any, Any] = {
        "figure.facecolor": palette.paper,
        "axes.facecolor": palette.paper,
        "savefig.facecolor": palette.paper,
        "text.color": palette.ink,
        "axes.labelcolor": palette.ink,
        "axes.edgecolor": palette.faint,
        "xtick.color": palette.ink,
        "ytick.color": palette.ink,
        "grid.color": palette.faint,
    }
    shapes: dict[Any, Any] = {
        "font.size": 11,
        "axes.titlesize": 13,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
        "lines.linewidth": 2.2,
        "legend.frameon": False,
        "legend.fontsize": 10,
    }
    with matplotlib.rc_context({**colours, **shapes}):
        yield


def _rate_kinds(record: RunRecord) -> list[str]:
    """Names the logged rates: those by kind of parameter, or the mean of an optimizer without kinds."""
    kinds = [kind for kind in KINDS if record.series(f"optim/lr_{kind}")[0]]
    return kinds or [kind for kind in ("mean",) if record.series("optim/lr_mean")[0]]


def _has_rates(record: RunRecord) -> bool:
    return bool(_rate_kinds(record))


def _draw_rates(record: RunRecord, axes: Any, palette: Palette) -> None:
    """Draws the rates that were really applied, the rails that they move between, and the schedule."""
    kinds = _rate_kinds(record)
    for i, (kind, hue) in enumerate(zip(kinds, palette.hues, strict=False)):
        steps, rates = record.series(f"optim/lr_{kind}")
        width = 2.0 + 0.9 * (len(kinds) - 1 - i)  # equal rates are common: the first line shows around the last
        marker = "o" if len(steps) == 1 else None
        axes.plot(steps, rates, color=hue, linewidth=width, marker=marker, label=KINDS.get(kind, "mean rate"))
    steps, schedule = record.series("learning_rate")
    if steps:
        axes.plot(steps, schedule, color=palette.faint, linestyle=":", label="schedule")
    all_rails = _rails(record.config)
    for (rails, names), dashes in zip(all_rails.items(), RAIL_DASHES, strict=False):
        for height, label in zip(sorted(set(rails)), (f"rail of {', '.join(names)}", None), strict=False):
            axes.axhline(height, color=palette.faint, linestyle=dashes, linewidth=1.2, label=label)
    axes.set_yscale("log")
    applied = [rate for kind in kinds for rate in record.series(f"optim/lr_{kind}")[1]]
    searched = [low for low, high in all_rails if low < high]
    lowest = min(searched, default=max(applied) / DECADES) / 2
    if max(applied) > lowest:  # a schedule that ends at zero would squeeze everything else into the upper half
        axes.set_ylim(bottom=max(lowest, axes.get_ylim()[0]))
    axes.set(title="Learning rate really applied", ylabel="learning rate")
    _count_steps(axes)
    _legend(axes)


def _rails(config: Mapping[str, Any]) -> dict[tuple[float, float], list[str]]:
    """Returns the pairs of rails and whose they are; twice the upper one where nothing is searched for."""
    rails: dict[tuple[float, float], list[str]] = {}
    for group in config.get("groups", []):
        if group.get("self_tuning") and group.get("elements"):
            names = rails.setdefault((group["min_lr" if group["lr_search"] else "max_lr"], group["max_lr"]), [])
            name = KINDS[role_key(group["role"], group["is_full_weight"])]
            names += [name] if name not in names else []
    return rails


def _has_memory(record: RunRecord) -> bool:
    return bool(record.config.get("memory", {}).get("total_bytes"))


def _draw_memory(record: RunRecord, axes: Any, palette: Palette) -> None:
    """Draws the bytes of optimizer state by what they hold, beside Adam's."""
    memory = record.config["memory"]
    unit, scale = ("MB", 2**20) if memory["adam_bytes"] >= 2**18 else ("KB", 2**10)
    states = sorted(memory["bytes_by_state"].items(), key=lambda item: -item[1])
    largest = [item for item in states[: len(palette.hues) - 1] if item[1]]
    rest = memory["total_bytes"] - sum(size for _, size in largest)
    name, left = record.config["optimizer"], 0.0
    for (state, size), hue in zip([*largest, ("everything else", rest)], palette.hues, strict=False):
        if size:
            axes.barh(name, size / scale, left=left, color=hue, label=f"{state} {_amount(size / scale)}", height=0.55)
            left += size / scale
    axes.barh("Adam in fp32", memory["adam_bytes"] / scale, color=palette.faint, height=0.55)
    for row, size in enumerate((memory["total_bytes"], memory["adam_bytes"])):
        axes.text(size / scale, row, f" {_amount(size / scale)} {unit}", va="center")
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.16)
    axes.set(title="Memory of the optimizer state", xlabel=unit)
    _legend(axes, columns=2)


def _amount(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _has_controller(record: RunRecord) -> bool:
    moved = any(abs(multiplier - 1.0) >= 0.01 for multiplier in record.series("optim/multiplier")[1])
    return moved or bool(record.events)


def _draw_controller(record: RunRecord, axes: Any, palette: Palette) -> None:
    """Draws what the context multiplied the rate with, and marks the events."""
    steps, multipliers = record.series("optim/multiplier")
    if steps:
        axes.plot(steps, multipliers, color=palette.hues[0], label="multiplier of the rate")
        axes.set_ylim(0.4, 2.1)
    else:
        axes.set_yticks([])
    kinds = sorted({event["code"] for event in record.events})
    for kind, style in zip(kinds, ("-", "--", ":"), strict=False):
        at = [event["step"] for event in record.events if event["code"] == kind]
        label = f"{kind.lower().replace('_', ' ')} ({len(at)})"
        for i, step in enumerate(at):
            axes.axvline(step, color=palette.alarm, linestyle=style, linewidth=1.4, label=None if i else label)
    axes.set(title="Context controller and events", ylabel="multiplier" if steps else "")
    _count_steps(axes)
    _legend(axes)


def _has_rank(record: RunRecord) -> bool:
    return bool(record.series("optim/effective_rank")[0])


def _draw_rank(record: RunRecord, axes: Any, palette: Palette) -> None:
    """Draws the mean effective rank of the adapters."""
    steps, ranks = record.series("optim/effective_rank")
    axes.plot(steps, ranks, color=palette.hues[0], marker="o" if len(steps) == 1 else None)
    axes.set(title="Effective rank of the adapters, mean of all pairs", ylabel="effective rank")
    _count_steps(axes)
    axes.set_ylim(bottom=0)


def _count_steps(axes: Any) -> None:
    axes.set_xlabel("step")
    axes.xaxis.get_major_locator().set_params(integer=True)


def _legend(axes: Any, columns: int = 3) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper center", bbox_to_anchor=(0.45, -0.16), ncols=columns)


# What may be drawn: file name, whether the run has something for it, and who draws it.
PLOTS = {
    "learning_rates": (_has_rates, _draw_rates),
    "memory": (_has_memory, _draw_memory),
    "events": (_has_controller, _draw_controller),
    "effective_rank": (_has_rank, _draw_rank),
}
