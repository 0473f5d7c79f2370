"""Spatial terms: filters along axes that have neighbours, as a convolution's taps, and weights of whole filters.

Rows and columns of Linear and LoRA matrices have no order, so a filter along them would act on a meaningless
permutation: no recipe puts these transforms there. There is no evidence that they help a language model.
"""

import dataclasses
import math

import torch
from torch import Tensor

from .core import Measured, State, StateSpec, StepContext, Transform


def spatial_axes(shape: tuple[int, ...], declared: tuple[int, ...] = ()) -> tuple[int, ...]:
    """Names the axes of a parameter that have neighbours and at least three places.

    Args:
        shape: the parameter's own shape.
        declared: what the user says, counted from 0; axes that the parameter lacks are passed over. Without it, the
            taps of kernels in two or more dimensions, [out, in, height, width, ...]. A kernel in one dimension has to
            be declared: stacked experts have three axes as well.
    """
    candidates = declared or tuple(range(2, len(shape)) if len(shape) >= 4 else ())
    return tuple(sorted({axis for axis in candidates if axis < len(shape) and shape[axis] >= 3}))


@dataclasses.dataclass(frozen=True)
class Kernel:
    """How a parameter lies in space.

    Args:
        shape: its own shape; the first axis becomes the rows of the stack, the others its columns.
        axes: those along which neighbours are close.
    """

    shape: tuple[int, ...]
    axes: tuple[int, ...]

    @property
    def dims(self) -> tuple[int, ...]:
        """The axes as dimensions of `unfold`'s result."""
        return tuple(axis + 1 for axis in self.axes)

    @property
    def crosses_rows(self) -> bool:
        """Whether a filter needs all rows of the matrix at once."""
        return 0 in self.axes

    def unfold(self, matrices: Tensor) -> Tensor:
        """Gives a stack, or rows of it, the parameter's own axes: [n, rows, cols] -> [n, rows, *shape[1:]]."""
        return matrices.reshape(*matrices.shape[:2], *self.shape[1:])


@dataclasses.dataclass(frozen=True)
class SuppressEdges(Transform):
    """Smooths a rough direction: where |Lap d| / |d| > threshold, d <- (I - sigma Lap)^-1 d along each axis.

    Laplacian smoothing (LSGD, arXiv 1806.06317), periodic; applied to the direction, because a normalisation after it
    would undo it. On three taps all rough modes share one gain and it is d <- mean + (d - mean) / (1 + 3 sigma).

    Args:
        kernel: the axes.
        sigma: strength, in squared taps. Larger is smoother; 1 leaves 0.27 of white noise's variance along a long
            axis.
        threshold: roughness above which it acts, a ratio without a unit; white noise has about 2.4 along one axis and
            4.5 along two. Smaller acts more often.
    """

    kernel: Kernel
    sigma: float
    threshold: float

    @property
    def needs_whole_matrix(self) -> bool:
        """Whether it cannot run on a piece of the rows."""
        return self.kernel.crosses_rows

    def states(self) -> tuple[StateSpec, ...]:
        """Declares the roughness of the last step, for monitors; nothing is computed from it."""
        return (
            StateSpec("edge_roughness", "scalar", "norm of the last direction's Laplacian over the direction's own"),
        )

    def measure(self, update: Tensor, state: State, context: StepContext) -> Measured:
        """Sums the squares of the direction and of its Laplacian."""
        rough = _laplacian(self.kernel.unfold(update), self.kernel.dims)
        return Measured(matrix={"rough": rough.square().flatten(1).sum(-1), "squares": update.square().sum((-1, -2))})

    def apply(
        self, update: Tensor, state: State, measured: Measured | None, context: StepContext
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Smooths the matrices that are rough."""
        assert measured is not None
        squares = measured.matrix["squares"]
        roughness = (measured.matrix["rough"] / torch.where(squares > 0, squares, 1.0)).sqrt()
        smooth = _smooth(self.kernel.unfold(update), self.kernel.dims, self.sigma).reshape(update.shape)
        update = torch.where((roughness > self.threshold)[:, None, None], smooth, update)
        return update, {"edge_roughness": roughness}


def _laplacian(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Sums the periodic second differences over the axes."""
    total = torch.zeros_like(x)
    for dim in dims:
        total = total + x.roll(1, dim) + x.roll(-1, dim) - 2 * x
    return total


def _smooth(x: Tensor, dims: tuple[int, ...], sigma: float) -> Tensor:
    """Solves (I - sigma Lap) y = x along one axis after another."""
    for dim in dims:
        taps = x.shape[dim]
        if taps == 3:
            mean = x.mean(dim, keepdim=True)
            x = mean + (x - mean) / (1 + 3 * sigma)
        else:
            turn = torch.fft.rfftfreq(taps, device=x.device, dtype=x.dtype) * (2 * math.pi)
            gain = 1 / (1 + 2 * sigma * (1 - turn.cos()))
            x = torch.fft.irfft(torch.fft.rfft(x, dim=dim) * _along(gain, dim, x.ndim), n=taps, dim=dim)
    return x


def _along(values: Tensor, dim: int, ndim: int) -> Tensor:
    """Shapes a vector so that it multiplies one dimension."""
    return values.view(*(-1 if i == dim else 1 for i in range(ndim)))


@dataclasses.dataclass(frozen=True)
class PenaliseFrequencies(Transform):
    """Damps fast variation along the axes: H(f) = 1 / (1 + strength |f|^2 / f_N^2), phases kept, f_N = 1/2 a tap.

    The constant part passes unchanged. This replaces the seeds' penalty, which drops the phase and keeps the wrong
    band.

    Args:
        kernel: the axes.
        strength: without a unit; 1 halves what alternates from tap to tap. Larger damps more.
    """

    kernel: Kernel
    strength: float

    @property
    def needs_whole_matrix(self) -> bool:
        """Whether it cannot run on a piece of the rows."""
        return self.kernel.crosses_rows

    def apply(
        self, update: Tensor, state: State, measured: Measured | None, context: StepContext
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Filters the direction."""
        x, dims = self.kernel.unfold(update), self.kernel.dims
        taps = [x.shape[dim] for dim in dims]
        squared = torch.zeros((), device=x.device, dtype=x.dtype)
        for dim, n in zip(dims, taps, strict=True):
            frequencies = torch.fft.rfftfreq if dim == dims[-1] else torch.fft.fftfreq
            squared = squared + _along((2 * frequencies(n, device=x.device, dtype=x.dtype)).square(), dim, x.ndim)
        spectrum = torch.fft.rfftn(x, dim=dims) / (1 + self.strength * squared)
        return torch.fft.irfftn(spectrum, s=taps, dim=dims).reshape(update.shape), {}


@dataclasses.dataclass(frozen=True)
class DampBackground(Transform):
    """Shortens filters whose signal is weak: row i steps at 1/2 + 1/2 min(1, s_i / median(s)).

    s_i is the row's mean squared momentum. The momentum averages the normalised gradient, so that its square is the
    signal-to-noise ratio m^2 / v already. Our heuristic; the seeds compare a variance with an absolute number, which
    depends on the loss's scale.
    """

    def measure(self, update: Tensor, state: State, context: StepContext) -> Measured:
        """Takes the signal of these rows."""
        return Measured(matrix={"signal": _place_rows(state["exp_avg"].square().mean(-1), context)})

    def apply(
        self, update: Tensor, state: State, measured: Measured | None, context: StepContext
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Damps the rows below the median."""
        assert measured is not None
        relative = _own_rows(_relative_to_median(measured.matrix["signal"]), update, context)
        return update * (0.5 + 0.5 * relative.clamp_max(1.0))[:, :, None], {}


@dataclasses.dataclass(frozen=True)
class WeightRowsByVariance(Transform):
    """Lets calm filters step faster than torn ones: row i at p + (1 - p) clip((V_i / median(V))^(-1/4), 1/2, 2).

    V_i is an average over steps of the gradient's variance within row i, relative to the other rows of the same
    parameter, so that the loss's scale does not matter. Our heuristic, largely redundant with the row factors of the
    second moment.

    Args:
        beta2: decay of the average.
        preservation: p, 0 to 1. Larger leaves the rows as they are.
    """

    beta2: float
    preservation: float

    def states(self) -> tuple[StateSpec, ...]:
        """Declares the average, one number a row."""
        return (StateSpec("spatial_variance", "rows", "average of the gradient's variance within each row"),)

    def measure(self, update: Tensor, state: State, context: StepContext) -> Measured:
        """Averages the variance of these rows."""
        variance = torch.lerp(state["spatial_variance"], context.grad.var(-1, correction=0), 1 - self.beta2)
        return Measured(matrix={"variance": _place_rows(variance, context)}, rows={"variance": variance})

    def apply(
        self, update: Tensor, state: State, measured: Measured | None, context: StepContext
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Weights the rows."""
        assert measured is not None
        relative = _own_rows(_relative_to_median(measured.matrix["variance"]), update, context)
        weight = torch.lerp(relative.pow(-0.25).clamp(0.5, 2.0), torch.ones_like(relative), self.preservation)
        return update * weight[:, :, None], {"spatial_variance": measured.rows["variance"]}


def _place_rows(values: Tensor, context: StepContext) -> Tensor:
    """Puts these rows' values among zeros for all other rows [n, rows]: added up over pieces, everybody has all."""
    after = context.rows - context.first_row - values.shape[-1]
    return torch.nn.functional.pad(values, (context.first_row, after))


def _own_rows(values: Tensor, update: Tensor, context: StepContext) -> Tensor:
    """Takes back the values of the rows that `update` holds."""
    return values[:, context.first_row : context.first_row + update.shape[1]]


def _relative_to_median(values: Tensor) -> Tensor:
    """Divides by the median over rows, ones where it is zero: [n, rows]."""
    ordered, rows = values.sort(-1).values, values.shape[-1]
    median = (ordered[:, (rows - 1) // 2] + ordered[:, rows // 2])[:, None] / 2
    return torch.where(median > 0, values / torch.where(median > 0, median, 1.0), 1.0)
