"""Confidence: where the gradient keeps missing its own average, the step is shortened."""

import dataclasses

import torch
from torch import Tensor

from .core import Measured, State, StateSpec, StepContext, Transform, bias_correction

RESIDUAL_FLOOR = 2.0**-20  # of the mean square: a gradient that never misses must not divide by zero


@dataclasses.dataclass(frozen=True)
class Confidence(Transform):
    """Divides the momentum by row and column estimates of its residual U = (u - m)^2 (CAME, arXiv 2307.02047).

    Against the paper, m enters U uncorrected (corrected, the first step divides by zero), the averages are floored and
    bias-corrected, so that the first step is as long as the hundredth, and the direction d is scaled down to an RMS of
    1. The RMS itself would take one more sweep over the matrix; here it is that of a momentum whose squares are the
    product of their sums over rows and columns, which the sweep that measures U adds up as well:

        mean(d^2) ~ sum_i(M_i / R'_i) mean(R') sum_j(N_j / C'_j) / (sum(M) rows cols)

    with M_i and N_j the sums of the squared momentum over row i and column j, R' and C' the averages of U. Where it is
    above 1, in the first steps of a run and where a gradient keeps its sign, it was within 5% of the RMS on LoRA runs;
    after 250 steps the way differed by 0.02 and 0.2%. The very first step of a matrix of eight rows may be 1.3 times
    as long as its rate.

    Args:
        beta3: decay of the residual's averages. Larger reacts later to a gradient that becomes unsteady.
        eps: added to U.
        floor: U stays above this share of the update's mean square; 0 in the paper.
        corrected: whether the zero start is corrected for; the paper does not.
        clips: whether the direction is scaled down; not in the paper.
    """

    beta3: float
    eps: float
    floor: float = RESIDUAL_FLOOR
    corrected: bool = True
    clips: bool = True

    def states(self) -> tuple[StateSpec, ...]:
        """Declares the two averages."""
        meaning = "average of the momentum's squared residual over each"
        return (
            StateSpec("exp_avg_res_row", "rows", f"{meaning} row", quantizes=True),
            StateSpec("exp_avg_res_col", "cols", f"{meaning} column", quantizes=True),
        )

    def measure(self, update: Tensor, state: State, context: StepContext) -> Measured:
        """Sums the residual over rows and over columns, and the squared momentum likewise."""
        residual = (state["normalized"] - state["exp_avg"]).square_()
        seen = self._floored(residual.mean(-1), state)
        row = torch.lerp(state["exp_avg_res_row"], seen, 1 - self.beta3)
        sums = {"row": row.sum(-1), "col": residual.sum(-2)}
        if self.clips:
            squares = update.square()
            sums |= {"weighted": (squares.sum(-1) / row).sum(-1), "squares": squares.sum(-2)}
        return Measured(matrix=sums, rows={"row": row})

    def apply(
        self, update: Tensor, state: State, measured: Measured | None, context: StepContext
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Shortens the rows and columns that the average predicts badly."""
        assert measured is not None
        row = measured.rows["row"]
        seen = self._floored(measured.matrix["col"] / context.rows, state)
        col = torch.lerp(state["exp_avg_res_col"], seen, 1 - self.beta3)
        mean = (measured.matrix["row"] / context.rows)[:, None]
        unbiased = col[:, None, :] / bias_correction(self.beta3 if self.corrected else 0.0, context.step)
        by_row = (row / mean).rsqrt()
        if self.clips:
            squares = measured.matrix["squares"]
            total = squares.sum(-1)
            weighted = measured.matrix["weighted"] * mean[:, 0] * (squares / unbiased[:, 0]).sum(-1)
            mean_square = weighted / torch.where(total > 0, total, 1.0) / context.numel
            by_row = by_row / mean_square.sqrt().clamp_min(1.0)[:, None]
        by_row, by_col = context.once(by_row[:, :, None]), context.once(unbiased.rsqrt())
        return (update * by_row).mul_(by_col), {"exp_avg_res_row": row, "exp_avg_res_col": col}

    def _floored(self, mean: Tensor, state: State) -> Tensor:
        floor = self.floor * state["mean_square"][:, None]
        return torch.maximum(mean, floor) + self.eps
