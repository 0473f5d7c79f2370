"""Stage 4, terms that need neighbours: they act on conv kernels and declared axes, and are inert everywhere else.

Rows and columns of Linear and LoRA matrices have no order, so no filter along them means anything. Axes are periodic.
Filters along axes take the parameter's own shape, weights of rows its matrix view.
"""

import statistics

import torch
from torch import Tensor


def spatial_axes(shape: tuple[int, ...], declared: tuple[int, ...] | None) -> tuple[int, ...]:
    """Names the axes that have neighbours: the declared ones, else axes 2, 3, ... of a conv kernel with size >= 3."""
    candidates = range(2, len(shape)) if declared is None else [axis % len(shape) for axis in declared]
    return tuple(axis for axis in candidates if shape[axis] >= 3)


def laplacian(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Sums the periodic second differences x[i-1] - 2 x[i] + x[i+1] over the axes."""
    total = torch.zeros_like(x)
    for axis in axes:
        total = total + x.roll(1, axis) - 2 * x + x.roll(-1, axis)
    return total


def smooth(x: Tensor, axes: tuple[int, ...], sigma: float) -> Tensor:
    """Laplacian smoothing (LSGD, arXiv 1806.06317): solves (I - sigma Lap) y = x along one axis after another."""
    for axis in axes:
        identity = torch.eye(x.shape[axis], dtype=x.dtype)
        system = identity - sigma * laplacian(identity, (0,))
        x = torch.tensordot(torch.linalg.inv(system), x.movedim(axis, 0), dims=1).movedim(0, axis)
    return x


def suppress_edges(d: Tensor, axes: tuple[int, ...], edge_penalty: float, edge_threshold: float) -> Tensor:
    """Smooths a rough direction: where norm(Lap d) / norm(d) > edge_threshold, with sigma = edge_penalty."""
    if laplacian(d, axes).norm() > edge_threshold * d.norm():
        return smooth(d, axes, edge_penalty)
    return d


def penalise_frequencies(d: Tensor, axes: tuple[int, ...], frequency_penalty: float) -> Tensor:
    """Low-pass filter that keeps the phase: H(f) = 1 / (1 + lambda (|f| / f_N)^2), true frequencies, f_N = 1/2."""
    squared = torch.zeros_like(d)
    for axis in axes:
        shape = [1] * d.ndim
        shape[axis] = d.shape[axis]
        squared = squared + (torch.fft.fftfreq(d.shape[axis], dtype=d.dtype) / 0.5).square().reshape(shape)
    spectrum = torch.fft.fftn(d, dim=axes) / (1 + frequency_penalty * squared)
    return torch.fft.ifftn(spectrum, dim=axes).real


def relative_to_median(values: Tensor) -> Tensor:
    """Divides by the median; all ones where the median is zero."""
    median = statistics.median(values.tolist())
    return values / median if median > 0 else torch.ones_like(values)


def background_weights(m: Tensor) -> Tensor:
    """Halves, at most, the filters of low signal-to-noise: w_i = 1/2 + 1/2 min(1, s_i / median(s)).

    s_i = mean of m^2 over filter i. m averages the normalised gradient, so m^2 is already m^2 / v.
    """
    return 0.5 + 0.5 * relative_to_median(m.square().mean(dim=1)).clamp(max=1)


def row_variance(g: Tensor) -> Tensor:
    """Variance of the gradient within each row, the observation behind `spatial_variance`: [rows]."""
    return g.var(dim=1, correction=0)


def awareness_weights(spatial_variance: Tensor, detail_preservation: float) -> Tensor:
    """Rate weights of rows, calm rows faster: w_i = clip((s_i / median(s))^(-1/4), 1/2, 2), mixed with 1.

    detail_preservation: 1 leaves every row as it is, 0 weights it fully.
    """
    weights = relative_to_median(spatial_variance).pow(-0.25).clamp(0.5, 2.0)
    return detail_preservation + (1 - detail_preservation) * weights
