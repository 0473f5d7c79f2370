"""Draws how far each starting rate ends from AdamW's best, one panel a task."""

from pathlib import Path

from .measures import GOAL, OURS, RIVAL, SEARCH, Results

TOP = 3.0  # ratios above it are drawn as triangles at the upper edge
STYLES = {
    RIVAL: ("C7", "o", 4.5),
    "Prodigy": ("C4", "v", 5),  # its starting rate is d0
    "ancestor": ("C5", "P", 5),
    OURS: ("C0", "s", 7),
    SEARCH: ("C1", "D", 3.5),
}


def draw(results: Results, horizon: int, seed: int, path: Path) -> None:
    """Writes the plot."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = -(-len(results.tasks) // 3)
    figure, axes = plt.subplots(rows, 3, figsize=(11, 2.9 * rows), sharex=True, sharey=True, squeeze=False)
    for axis in axes.flat[len(results.tasks) :]:
        axis.set_visible(False)
    for axis, task in zip(axes.flat, results.tasks, strict=False):
        axis.axhspan(0, GOAL, color="C2", alpha=0.12, lw=0)
        for arm, (color, marker, size) in STYLES.items():
            ratios = results.starts((task, horizon, seed), arm)
            if not ratios:
                continue
            rates, heights = list(ratios), [min(ratio, TOP) for ratio in ratios.values()]
            inside = [lr for lr in rates if ratios[lr] <= TOP]
            above = [lr for lr in rates if ratios[lr] > TOP]
            axis.plot(rates, heights, color=color, lw=1.4)
            axis.plot(inside, [ratios[lr] for lr in inside], marker, color=color, ms=size, label=arm)
            axis.plot(above, [TOP] * len(above), "^", color=color, ms=7, clip_on=False)
        axis.set(title=task, xscale="log", ylim=(0.8, TOP), xlim=(6e-7, 1.7e-1))
        axis.title.set_size(10)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("starting rate")
    for axis in axes[:, 0]:
        axis.set_ylabel("loss / AdamW's best")
    shown = {label: line for axis in axes.flat for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    arms = [arm for arm in STYLES if arm in shown]
    figure.legend([shown[arm] for arm in arms], arms, loc="upper center", ncols=len(arms), frameon=False)
    said = f"{horizon} steps, seed {seed}; the band is within 5% of AdamW's best; triangles lie above {TOP:g}"
    figure.text(0.5, 0.005, said, ha="center", fontsize=9)
    figure.subplots_adjust(left=0.06, right=0.985, top=0.92, bottom=0.085, hspace=0.25, wspace=0.08)
    figure.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(figure)
