"""The first seed's dashboard: memory, compression, rounding error and learning rates over the steps of a run."""

import os
from pathlib import Path
from typing import Any

import torch

from ..optim.automagic import Automagic
from ..seeds.views import get_memory_stats, quantized_states
from .plots import figure_class
from .rates import read_at_once
from .snapshot import OptimizerSnapshot
from .stats import replaced


class TrainingDashboard:
    """Collects what an optimizer tells at some steps, and plots it.

    `metrics` maps `memory_usage` in bytes, `compression_ratio`, `quantization_errors` and `learning_rates` to lists
    with an entry for each update. The error is the relative L2 error that storing costs a state held as codes, on
    average.

    Args:
        optimizer: an Automagic.
    """

    def __init__(self, optimizer: Automagic) -> None:
        """Starts without a step."""
        self.optimizer = optimizer
        self.steps: list[int] = []
        self.metrics: dict[str, list[float]] = {
            "memory_usage": [],
            "compression_ratio": [],
            "quantization_errors": [],
            "learning_rates": [],
        }

    def update(self, step: int) -> None:
        """Reads the optimizer, after a step of that number."""
        stats = get_memory_stats(self.optimizer)
        self.steps.append(step)
        self.metrics["memory_usage"].append(stats["total_quantized_memory"] + stats["total_high_precision_memory"])
        self.metrics["compression_ratio"].append(stats["compression_ratio"])
        self.metrics["quantization_errors"].append(_mean_error(self.optimizer))
        self.metrics["learning_rates"].append(OptimizerSnapshot.take(self.optimizer).lr.mean)

    def plot_metrics(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Draws the four metrics over the steps, without a display.

        Args:
            path: where to save the figure.

        Returns:
            The matplotlib figure, which a notebook shows.

        Raises:
            ImportError: matplotlib is not installed.
        """
        figure = figure_class()(figsize=(12, 8), layout="constrained")
        titles = ("Memory usage (bytes)", "Compression ratio", "Quantization error (relative)", "Learning rate")
        for axes, title, values in zip(figure.subplots(2, 2).flat, titles, self.metrics.values(), strict=True):
            axes.plot(self.steps, values, marker="o" if len(values) == 1 else None)
            axes.set(title=title, xlabel="step")
            axes.grid(alpha=0.25)
        if path is not None:
            path = Path(path)
            with replaced(path if path.suffix else path.with_suffix(".png")) as file:
                figure.savefig(file, format=path.suffix[1:] or "png")
        return figure


def _mean_error(optimizer: Automagic) -> float:
    states = [state for named in quantized_states(optimizer).values() for state in named.values() if state.fields]
    errors = read_at_once({i: state.relative_error for i, state in enumerate(states)})
    return float(torch.stack(list(errors.values())).nanmean()) if errors else 0.0
