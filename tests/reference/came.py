"""Stages 1 to 3, the direction: normalise by the second moment, average over time, divide by the instability.

Letters: g gradient, u normalised gradient, m its moving average, d the direction; R, C row and column vectors;
t the number of steps this parameter has taken, the current one included. All matrices are [rows, cols], float64.
CAME is arXiv 2307.02047; as published it has no bias correction and overshoots its first hundred steps, so `paper_*`
are for parity only.
"""

import math

import torch
from torch import Tensor

ZERO_MEAN_SQUARE = 2.0**-114  # a mean square below this is no gradient at all: lora_A before B has moved
SMALLEST_FACTOR = 2.0**-60  # floor of R_i / mean(R) and C_j / mean(R)
INSTABILITY_FLOOR = 2.0**-20  # floor of U's means, relative to mean(u^2): a consistent gradient has U near zero


def as_matrix(tensor: Tensor) -> Tensor:
    """Views a tensor as [rows, cols]: () -> (1, 1), (n,) -> (1, n), (n, a, b, ...) -> (n, a * b * ...)."""
    if tensor.ndim < 2:
        return tensor.reshape(1, tensor.numel())
    return tensor.reshape(tensor.shape[0], math.prod(tensor.shape[1:]))


def is_factored(matrix: Tensor) -> bool:
    """Says whether there are several rows and columns; else the second moment is full and stage 3 is skipped."""
    return matrix.shape[0] > 1 and matrix.shape[1] > 1


def ema(old: Tensor, new: Tensor, beta: float) -> Tensor:
    """Moves an average: beta * old + (1 - beta) * new."""
    return beta * old + (1 - beta) * new


def rms(x: Tensor) -> Tensor:
    """Root of the mean square."""
    return x.square().mean().sqrt()


def clip_by_rms(x: Tensor, threshold: float) -> Tensor:
    """Shrinks x as a whole so that its RMS is at most the threshold: x / max(1, rms(x) / threshold)."""
    return x / max(1.0, rms(x).item() / threshold)


# stage 1: second moment


def factored_second_moment(g: Tensor, row: Tensor, col: Tensor, beta2: float, t: int) -> tuple[Tensor, Tensor, Tensor]:
    """Divides g by the root of its factored second moment, as separate factors.

    R <- b2 R + (1 - b2) mean_j g^2,  C <- b2 C + (1 - b2) mean_i g^2,  mu = mean(R) / (1 - b2^t),
    u = (g / sqrt(mu)) * rsqrt(max(R_i / mean(R), 2^-60)) * rsqrt(max(C_j / mean(R), 2^-60));  u = 0 where mu < 2^-114.
    """
    row = ema(row, g.square().mean(dim=1), beta2)
    col = ema(col, g.square().mean(dim=0), beta2)
    mean = row.mean()
    mean_square = mean / (1 - beta2**t)
    if mean_square < ZERO_MEAN_SQUARE:
        return torch.zeros_like(g), row, col
    row_factor = (row / mean).clamp(min=SMALLEST_FACTOR).rsqrt()
    col_factor = (col / mean).clamp(min=SMALLEST_FACTOR).rsqrt()
    return g / mean_square.sqrt() * row_factor[:, None] * col_factor[None, :], row, col


def full_second_moment(g: Tensor, exp_avg_sq: Tensor, beta2: float, t: int) -> tuple[Tensor, Tensor]:
    """Divides each element of g by the root of its own second moment.

    v <- b2 v + (1 - b2) g^2,  v_hat = v / (1 - b2^t),  u = g / sqrt(v_hat);  u = 0 where v_hat < 2^-114.
    """
    exp_avg_sq = ema(exp_avg_sq, g.square(), beta2)
    v_hat = exp_avg_sq / (1 - beta2**t)
    u = torch.where(v_hat >= ZERO_MEAN_SQUARE, g / v_hat.sqrt(), torch.zeros_like(g))
    return u, exp_avg_sq


# stage 2: momentum


def bias_corrected(m: Tensor, beta: float, t: int) -> Tensor:
    """Undoes the start from zero of an average: m / (1 - beta^t)."""
    return m / (1 - beta**t)


def scale_beta(beta1: float, scale: float) -> float:
    """Gives momentum scale k its decay: b1^(1/k), a horizon k times as long."""
    return beta1 ** (1 / scale)


def combine_scales(momenta: dict[float, Tensor], beta1: float, t: int) -> Tensor:
    """Averages the bias-corrected momenta of several horizons with weights 1/k, normalised.

    m_hat = sum_k (1/k) m_k / (1 - b_k^t) / sum_k (1/k),  b_k = b1^(1/k).
    """
    weighted = sum(bias_corrected(m, scale_beta(beta1, k), t) / k for k, m in momenta.items())
    return torch.as_tensor(weighted / sum(1 / k for k in momenta))


# stage 3: confidence


def confidence(
    u: Tensor, m: Tensor, m_hat: Tensor, row: Tensor, col: Tensor, beta3: float, eps2: float, t: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Shrinks the momentum where the gradient disagrees with it, then caps the direction at an RMS of about 1.

    U = (u - m)^2 with the clipped u and the new, uncorrected m; its means have the floor f = 2^-20 mean(u^2):
    R' <- b3 R' + (1 - b3) (max(mean_j U, f) + e2),  C' likewise over rows,
    d = m_hat * rsqrt(R'_i / mean(R')) * rsqrt(C'_j / (1 - b3^t)),  d / max(1, rms(d)), with the RMS that d would have
    if m_hat^2 were the product of its marginals.
    """
    instability = (u - m).square()
    floor = INSTABILITY_FLOOR * u.square().mean()
    row = ema(row, torch.maximum(instability.mean(dim=1), floor) + eps2, beta3)
    col = ema(col, torch.maximum(instability.mean(dim=0), floor) + eps2, beta3)
    row_factor = (row / row.mean()).rsqrt()
    col_factor = (col / (1 - beta3**t)).rsqrt()
    squares = m_hat.square()
    separable = torch.outer(squares.sum(dim=1), squares.sum(dim=0)) / squares.sum().clamp_min(1e-300)
    size = (separable * row_factor.square()[:, None] * col_factor.square()[None, :]).mean().sqrt()
    return m_hat * row_factor[:, None] * col_factor[None, :] / size.clamp_min(1.0), row, col


# the modes for tests


def paper_second_moment(
    g: Tensor, row: Tensor, col: Tensor, beta2: float, eps1: float
) -> tuple[Tensor, Tensor, Tensor]:
    """CAME as published: additive e1, no bias correction, u = g / sqrt(R_i C_j / mean(R))."""
    row = ema(row, (g.square() + eps1).mean(dim=1), beta2)
    col = ema(col, (g.square() + eps1).mean(dim=0), beta2)
    return g / (row[:, None] * col[None, :] / row.mean()).sqrt(), row, col


def paper_full_second_moment(g: Tensor, exp_avg_sq: Tensor, beta2: float, eps1: float) -> tuple[Tensor, Tensor]:
    """CAME as published on a vector: u = g / sqrt(v) with v the uncorrected average of g^2 + e1."""
    exp_avg_sq = ema(exp_avg_sq, g.square() + eps1, beta2)
    return g / exp_avg_sq.sqrt(), exp_avg_sq


def paper_confidence(
    u: Tensor, m: Tensor, row: Tensor, col: Tensor, beta3: float, eps2: float
) -> tuple[Tensor, Tensor, Tensor]:
    """CAME as published: U = (u - m)^2 + e2, d = m / sqrt(R'_i C'_j / mean(R')), no floor, correction or clip."""
    instability = (u - m).square() + eps2
    row = ema(row, instability.mean(dim=1), beta3)
    col = ema(col, instability.mean(dim=0), beta3)
    return m / (row[:, None] * col[None, :] / row.mean()).sqrt(), row, col


def adam_direction(m_hat: Tensor, exp_avg_sq: Tensor, beta2: float, eps3: float, t: int) -> Tensor:
    """Adam's direction, for `momentum_order="before"`, where m averages the raw gradient.

    d = m_hat / (sqrt(v / (1 - b2^t)) + e3).
    """
    return m_hat / (bias_corrected(exp_avg_sq, beta2, t).sqrt() + eps3)
