"""Stages 5 and 11, what needs both halves of an adapter: A [r, in], B [out, r], the weight's change scaling * B A.

Everything is computed from the product itself, formed explicitly; the engine must get the same from r x r matrices.
"""

import math

import torch
from torch import Tensor

SMALLEST_SUM = 2.0**-100  # below this sum of squares B counts as zero


def row_norms(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Norms of the rows of scaling * B A, that is abs(scaling) * sqrt(b_i (A A^T) b_i^T): [out]."""
    return abs(scaling) * (b @ a).norm(dim=1)


def allora_gains(a: Tensor, b: Tensor, scaling: float, eta: float) -> tuple[Tensor, float]:
    """Gains of ALLoRA (arXiv 2410.09692), normalised to at most 1: one per row of B, one for A as a whole.

    s_i = 1 / sqrt(1 + eta^2 norm_i), to the first power; A gets sum(s_i b_i^2) / sum(b_i^2), or 1 while B is zero.
    """
    gains = 1 / (1 + eta**2 * row_norms(a, b, scaling)).sqrt()
    weights = b.square().sum(dim=1)
    if weights.sum() < SMALLEST_SUM:
        return gains, 1.0
    return gains, ((gains * weights).sum() / weights.sum()).item()


def spectrum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD of B A = U diag(sigma) V^T, cut to the min(r, out, in) values that can be non-zero."""
    u, sigma, vt = torch.linalg.svd(b @ a, full_matrices=False)
    rank = min(a.shape[0], sigma.numel())
    return u[:, :rank], sigma[:rank], vt[:rank].T


def shrink_factors(sigma: Tensor, lr: float, strength: float, emphasis: float, every: int) -> Tensor:
    """Share of each singular value that stays: d_i = clip(1 - n lr lambda w_i, 1/2, 1).

    w_i = clip((rms(sigma) / sigma_i)^(kappa - 1), 0, 100): kappa = 1 decays B A, 1.2 is Schatten-1.8, 2 nuclear.
    """
    weights = (sigma.square().mean().sqrt() / sigma).pow(emphasis - 1).clamp(0, 100)
    return (1 - every * lr * strength * weights).clamp(0.5, 1.0)


def shrink_spectrum(
    a: Tensor, b: Tensor, lr: float, strength: float, emphasis: float, every: int
) -> tuple[Tensor, Tensor]:
    """Shrinks the singular values of B A, half in each factor: B A <- U D Sigma V^T. Skipped while B A = 0.

    B <- B + U (D^1/2 - I) U^T B,  A <- A + A V (D^1/2 - I) V^T.
    """
    u, sigma, v = spectrum(a, b)
    if sigma.square().mean() == 0:
        return a, b
    change = torch.diag(shrink_factors(sigma, lr, strength, emphasis, every).sqrt() - 1)
    return a + a @ v @ change @ v.T, b + u @ change @ u.T @ b


def effective_rank(sigma: Tensor) -> float:
    """exp(H(p)) with p = sigma / sum(sigma), H the entropy: how many directions share the change."""
    p = sigma[sigma > 0] / sigma.sum()
    return math.exp(-(p * p.log()).sum().item())


def stable_rank(sigma: Tensor) -> float:
    """sum(sigma^2) / max(sigma)^2."""
    return (sigma.square().sum() / sigma.max().square()).item()
