"""Second moments: each element's gradient is divided by how large it usually is."""

import dataclasses

import torch
from torch import Tensor

from .core import Measured, State, StateSpec, StepContext, Transform, bias_correction

TINY_MEAN_SQUARE = 2.0**-114  # below it g^2 has lost its bits in fp32: such a gradient counts as zero
TINY_RATIO = 2.0**-60  # a row or column this far below the mean keeps this much of it


@dataclasses.dataclass(frozen=True)
class FactoredSecondMoment(Transform):
    """Divides the gradient by row and column estimates of its RMS: u = g / sqrt(R_i C_j / mean(R)).

    Adafactor's factoring (arXiv 1804.04235, section 3) with CAME's moments (arXiv 2307.02047, algorithm 2) and one
    bias correction. The factors multiply one after the other: the product R C underflows in fp32 on the first LoRA
    steps.

    Args:
        beta2: decay of the averages. Larger remembers longer and recovers later from a spike, after 1 / (1 - beta2)
            steps.
        eps: added to the squared gradient; the paper's 1e-30 makes the update depend on the gradient's scale.
        corrected: whether the zero start is corrected for; the paper does not.
    """

    beta2: float
    eps: float = 0.0
    corrected: bool = True

    def states(self) -> tuple[StateSpec, ...]:
        """Declares the two averages."""
        return (
            StateSpec("exp_avg_sq_row", "rows", "average of the squared gradient over each row", quantizes=True),
            StateSpec("exp_avg_sq_col", "cols", "average of the squared gradient over each column", quantizes=True),
        )

    def measure(self, update: Tensor, state: State, context: StepContext) -> Measured:
        """Sums the squared gradient over rows and over columns."""
        squares = context.grad.square()
        squares = squares + self.eps if self.eps else squares
        row = torch.lerp(state["exp_avg_sq_row"], squares.mean(-1), 1 - self.beta2)
        return Measured(matrix={"row": row.sum(-1), "col": squares.sum(-2)}, rows={"row": row})

    def apply(
        self, update: Tensor, state: State, measured: Measured | None, context: StepContext
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Normalises the gradient; zero where a matrix has seen no gradient yet."""
        assert measured is not None
        row = measured.rows["row"]
        col = torch.lerp(state["exp_avg_sq_col"], measured.matrix["col"] / context.rows, 1 - self.beta2)
        mean = (measured.matrix["row"] / context.rows)[:, None]  # [n, 1]
        unbiased = mean[..., None] / bias_correction(self.beta2 if self.corrected else 0.0, context.step)
        alive = unbiased >= TINY_MEAN_SQUARE
        root = context.once(torch.where(alive, unbiased, 1.0).sqrt())
        by_row = context.once(torch.where(alive, _inverse_root(row, mean)[:, :, None], 0.0))
        by_col = context.once(_inverse_root(col, mean)[:, None, :])
        return (update / root).mul_(by_row).mul_(by_col), {"exp_avg_sq_row": row, "exp_avg_sq_col": col}


def _inverse_root(moment: Tensor, mean: Tensor) -> Tensor:
    return (moment / torch.where(mean > 0, mean, 1.0)).clamp_min(TINY_RATIO).rsqrt()


@dataclasses.dataclass(frozen=True)
class FullSecondMoment(Transform):
    """Divides each element of the gradient by its own RMS: u = g / sqrt(v), Adam's second moment (arXiv 1412.6980).

    For vectors and scalars, which have no rows to share; for matrices where `factored` is off.

    The moment is the raw gradient's, the numerator whatever arrives: after the momentum this is Adam's own order.

    Args:
        beta2: decay of the average.
        eps: added to the squared gradient.
        root_eps: added to the root; Adam's eps.
        corrected: whether the zero start is corrected for.
    """

    beta2: float
    eps: float = 0.0
    root_eps: float = 0.0
    corrected: bool = True

    def states(self) -> tuple[StateSpec, ...]:
        """Declares the average."""
        return (StateSpec("exp_avg_sq", "matrix", "average of the squared gradient of each element"),)

    def apply(
        self, update: Tensor, state: State, measured: Measured | None, context: StepContext
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Normalises the gradient; zero where an element has seen no gradient yet."""
        moment = torch.lerp(state["exp_avg_sq"], context.grad.square() + self.eps, 1 - self.beta2)
        unbiased = moment / bias_correction(self.beta2 if self.corrected else 0.0, context.step)
        alive = unbiased >= TINY_MEAN_SQUARE
        u = torch.where(alive, update / (torch.where(alive, unbiased, 1.0).sqrt() + self.root_eps), 0.0)
        return u, {"exp_avg_sq": moment}


@dataclasses.dataclass(frozen=True)
class ClipByRMS(Transform):
    """Scales a matrix's update down to a largest RMS: u / max(1, rms(u) / threshold) (arXiv 1804.04235, section 6).

    Args:
        threshold: the largest RMS. Smaller tames outliers harder and slows a matrix whose gradients grow.
    """

    threshold: float

    def measure(self, update: Tensor, state: State, context: StepContext) -> Measured:
        """Sums the squared update."""
        return Measured(matrix={"squares": update.square().sum((-1, -2))})

    def apply(
        self, update: Tensor, state: State, measured: Measured | None, context: StepContext
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Clips, and carries the clipped mean square [n]."""
        assert measured is not None
        mean_square = measured.matrix["squares"] / context.numel
        factor = context.once((mean_square.sqrt() / self.threshold).clamp_min(1.0))
        return update / factor[:, None, None], {"mean_square": context.once(mean_square / factor.square())}
