"""Sweeps: the passes over one chunk of a bucket, and what must not be done twice."""

import dataclasses

from torch import Tensor


@dataclasses.dataclass(eq=False)
class Sweep:
    """How far a chunk has come in a step.

    Args:
        totals: sums over whole matrices, one entry for each pass that measured them; None where one piece is all.
        written: pieces of rows whose weights and states are written.
        pool: the pooled sums of these  # each []
        whole: new states that are written after the last piece.
        is_over: whether everything of the chunk is written.
    """

    totals: list[dict[str, Tensor]] | None = None
    written: int = 0
    pool: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    whole: dict[str, list[Tensor]] = dataclasses.field(default_factory=dict)
    is_over: bool = False
