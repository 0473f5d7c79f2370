"""How the report writes tables, rates and ratios, and what its tasks are."""

import math
from collections.abc import Iterable, Sequence

from .lines import Line
from .measures import GOAL

TASKS = {
    "movie-lora": "MiniLM, LoRA of rank 8 on all linear layers but the pooler, movie sentences, 2 classes",
    "movie-full": "the same sentences, all of MiniLM",
    "source-lora": "MiniLM with LoRA, where a sentence comes from, 4 classes",
    "topics-lora": "MiniLM with LoRA, which package a docstring comes from, 20 classes",
    "text-scratch": "a Llama of 4 layers over bytes of film reviews, from nothing",
    "text-full": "that Llama, trained, then all of it on editorials",
    "text-lora": "that Llama, trained, then LoRA of rank 8 on editorials",
    "conv-scratch": "three convolutions on noisy digits, from nothing",
    "conv-lora": "that network, trained, then LoRA on turned, inverted digits",
}


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Lays out rows under heads."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [heads, ["---"] * len(heads), *rows]) + "\n"


def rate(lr: float) -> str:
    """Writes a rate, as 5e-5."""
    return f"{lr:.0e}".replace("e-0", "e-")


def percent(log: float, digits: int = 2) -> str:
    """Writes the logarithm of a ratio as a change in percent."""
    return f"{100 * math.expm1(log):+.{digits}f}%"


def marked(ratio: float) -> str:
    """Writes a ratio, bold where it misses the goal."""
    return f"**{ratio:.3f}**" if ratio > GOAL else f"{ratio:.3f}"


def span(values: Sequence[float]) -> str:
    """Writes the lowest and the highest of some ratios."""
    return f"{min(values):.3f} to {max(values):.3f}"


def tasks_of(lines: Iterable[Line]) -> list[str]:
    """Lists the tasks of some lines, those that are described first."""
    found = {line["task"] for line in lines}
    return [*(name for name in TASKS if name in found), *sorted(found - TASKS.keys())]
