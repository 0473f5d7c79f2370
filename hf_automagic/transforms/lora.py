"""LoRA pairs: gains by the rows of the product B A (ALLoRA), and its spectrum, without ever forming it."""

import dataclasses

import torch
from torch import Tensor

from .core import Measured, State, StepContext, Transform

SMALLEST_SUM = 2.0**-100  # below this sum of squares B counts as zero
LARGEST_WEIGHT = 100.0  # of a singular value in the rank penalty


@dataclasses.dataclass(frozen=True)
class ScaleByRowGain(Transform):
    """Multiplies each row of the direction by its gain; a parameter without a partner passes unchanged.

    ALLoRA (arXiv 2410.09692, section 4.2) scales the gradient; a normalisation would cancel that, so it is the
    direction here, exactly equivalent for B. The gains come from the weights before the step, see `allora_gains`.
    """

    def apply(
        self, update: Tensor, state: State, measured: Measured | None, context: StepContext
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Scales the rows."""
        return (update if context.row_gain is None else update * context.row_gain[:, :, None]), {}


def allora_gains(a: Tensor, b: Tensor, scaling: Tensor, eta: float) -> tuple[Tensor, Tensor]:
    """Returns ALLoRA's gains s_i = 1 / sqrt(1 + eta^2 |row i of scaling B A|) [k, out], and one for all of A [k].

    The norm enters in its first power; gains are at most 1, so that they only damp rows that have grown. A has no rows
    of the product and gets the mean of s_i weighted by |b_i|^2, 1 while B is zero.

    Args:
        a: [k, r, in]
        b: [k, out, r]
        scaling: what the forward pass multiplies B A with  # [k]
        eta: larger damps grown rows more; the paper's replacement of alpha / r.
    """
    norm_squared = ((b @ (a @ a.mT)) * b).sum(-1)
    norm = scaling.abs()[:, None] * norm_squared.clamp_min(0.0).sqrt()
    gain = (1 + eta**2 * norm).rsqrt()
    weight = b.square().sum(-1)
    total = weight.sum(-1)
    is_zero = total < SMALLEST_SUM
    return gain, torch.where(is_zero, 1.0, (gain * weight).sum(-1) / torch.where(is_zero, 1.0, total))


def shrink_spectrum(a: Tensor, b: Tensor, amount: Tensor, emphasis: float) -> tuple[Tensor, Tensor]:
    """Shrinks the singular values of B A = U diag(sigma) V^T by d_i = clip(1 - amount w_i, 1/2, 1), half in a factor.

    w_i = clip((rms(sigma) / sigma_i)^(emphasis - 1), 0, 100), the gradient of a Schatten norm of power 3 - emphasis.
    With B = Q_B R_B and A^T = Q_A R_A only the r x r core R_B R_A^T is decomposed. Returns what is to be added to A
    and to B, so that d = 1 moves nothing; zero while B A is.

    Args:
        a: [k, r, in]
        b: [k, out, r]
        amount: share taken from a singular value of weight 1  # [k] or []
        emphasis: 1 shrinks all alike (decay of B A), 2 takes the same from each (nuclear norm); larger thins small
            ones faster.
    """
    q_a, r_a = torch.linalg.qr(a.mT)
    q_b, r_b = torch.linalg.qr(b)
    u, sigma, vt = torch.linalg.svd(_core(r_a, r_b), full_matrices=False)
    size = sigma.square().mean(-1, keepdim=True).sqrt()
    weight = (size / sigma).pow(emphasis - 1).clamp(0.0, LARGEST_WEIGHT)
    lost = torch.where(size > 0, amount.reshape(-1, 1) * weight, 0.0).clamp(0.0, 0.5)
    change = -lost / (1 + (1 - lost).sqrt())  # sqrt(1 - lost) - 1 without cancellation
    to_a = q_a @ (vt.mT * change[:, None, :]) @ (vt @ r_a)
    to_b = q_b @ (u * change[:, None, :]) @ (u.mT @ r_b)
    return to_a.mT, to_b


def product_spectrum(a: Tensor, b: Tensor) -> Tensor:
    """Returns the singular values of B A that can be non-zero, largest first: [k, min(r, in, out)]."""
    return torch.linalg.svdvals(_core(torch.linalg.qr(a.mT).R, torch.linalg.qr(b).R))


def _core(r_a: Tensor, r_b: Tensor) -> Tensor:
    """Returns the core of the product [k, r, r]; zero where a weight is broken, because a decomposition raises."""
    core = r_b @ r_a.mT
    return torch.where(core.isfinite().all(-1, keepdim=True).all(-2, keepdim=True), core, 0.0)


def effective_rank(sigma: Tensor) -> Tensor:
    """Counts the directions that share the product: exp(entropy of sigma / sum(sigma)), 0 of zero: [k].

    Roy and Vetterli, The effective rank, EUSIPCO 2007.
    """
    total = sigma.sum(-1, keepdim=True)
    share = sigma / torch.where(total > 0, total, 1.0)
    entropy = -torch.special.xlogy(share, share).sum(-1)
    return torch.where(total.squeeze(-1) > 0, entropy.exp(), 0.0)


def stable_rank(sigma: Tensor) -> Tensor:
    """Counts directions by energy: sum(sigma^2) / max(sigma)^2, less moved by small values, 0 of zero: [k]."""
    largest = sigma.amax(-1, keepdim=True)
    return (sigma / torch.where(largest > 0, largest, 1.0)).square().sum(-1)
