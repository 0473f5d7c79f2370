"""Stage 7, the rate: one pooled log-rate for all tensors, and a code per element that bends it within a narrow band.

A positive cosine of the normalised gradient with the previous momentum says that the steps are too short. What step t
uses was computed from step t - 1. The scheduler's factor `sched` multiplies on top and is never touched.
"""

import math

import torch
from torch import Tensor

RHO = 10 ** (4 / 255)  # the ratio between neighbouring codes, 1.0368
CENTRE = 128  # code = 128 + k


# pooled controller


def pooled_cosine(pairs: list[tuple[Tensor, Tensor]]) -> float:
    """Pools all tensors: c = sum <u, m_prev> / sqrt(sum u^2 * sum m_prev^2), or 0 where that root is 0."""
    dot = sum((u * m).sum().item() for u, m in pairs)
    norm = math.sqrt(sum(u.square().sum().item() for u, _ in pairs) * sum(m.square().sum().item() for _, m in pairs))
    return dot / norm if norm > 0 else 0.0


def advance_log_rate(
    log_rate: float, cosine: float, numel: int, kappa: float, low: float, high: float, drift: float = 0.0
) -> float:
    """K <- clamp(K + kappa (clip(c sqrt(N/8) / 4, -1, 1) + drift), low, high).

    low, high: the rails as ln(rail / lr0), so that K never winds up outside them. drift: 0 stands still under noise.
    """
    log_rate += kappa * (min(max(cosine * math.sqrt(numel / 8) / 4, -1.0), 1.0) + drift)
    return min(max(log_rate, low), high)


def effective_lr(lr0: float, log_rate: float, sched: float, multiplier: float, min_lr: float, max_lr: float) -> float:
    """The rate of one parameter: sched * clamp(lr0 e^K, min_lr, max_lr / max(M, 1)) * M."""
    return sched * min(max(lr0 * math.exp(log_rate), min_lr), max_lr / max(multiplier, 1.0)) * multiplier


def fall(step: int, rail_steps: int) -> float:
    """What the rate has fallen to in a step, counted from 1: min(1, sqrt(T0 / t)); T0 = 0 never falls."""
    return min(1.0, math.sqrt(rail_steps / step)) if rail_steps else 1.0


# element mask


def mask_limit(mask_band: float) -> int:
    """Largest |k|: floor(ln(band) / ln(rho)), 38 for a band of 4."""
    return math.floor(math.log(mask_band) / math.log(RHO))


def vote(u: Tensor, m_prev: Tensor, beta1: float) -> Tensor:
    """sign(u m_prev) where |m_prev| > 2 sqrt((1 - b1) / (1 + b1)), else 0: noise of unit size rarely votes."""
    heard = m_prev.abs() > 2 * math.sqrt((1 - beta1) / (1 + beta1))
    return u.sign() * m_prev.sign() * heard


def advance_mask(codes: Tensor, votes: Tensor, limit: int) -> Tensor:
    """Counts the votes: k <- clamp(k + vote, -limit, limit), stored as uint8 codes 128 + k."""
    return ((codes.to(votes.dtype) - CENTRE + votes).clamp(-limit, limit) + CENTRE).to(torch.uint8)


def recentre_mask(codes: Tensor, limit: int) -> Tensor:
    """Shifts k <- k - round(mean k), so that the mask only says which elements are faster than others."""
    k = codes.to(torch.float64) - CENTRE
    return ((k - k.mean().round()).clamp(-limit, limit) + CENTRE).to(torch.uint8)


def mask_factor(codes: Tensor) -> Tensor:
    """Decodes to rho^k, what multiplies the parameter's rate element by element."""
    return RHO ** (codes.to(torch.float64) - CENTRE)
