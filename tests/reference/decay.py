"""Stage 9, weight decay with the rate that is really applied; never on biases, norms and magnitudes."""

import torch
from torch import Tensor

UNDECAYED_ROLES = frozenset({"bias", "norm", "magnitude"})


def decay(weight: Tensor, lr: float, weight_decay: float) -> Tensor:
    """Decoupled: W <- W (1 - lr wd)."""
    return weight * (1 - lr * weight_decay)


def decay_cautiously(weight: Tensor, d: Tensor, lr: float, weight_decay: float) -> Tensor:
    """Decays only where the step W - lr d does not push away from zero: d W >= 0, by signs (arXiv 2510.12402)."""
    return weight * (1 - lr * weight_decay * (d.sign() * weight.sign() >= 0).to(weight.dtype))


def write_selectively(weight: Tensor, change: Tensor, g: Tensor, origin: Tensor, weight_decay: float) -> Tensor:
    """Takes the step and pulls back towards W0 only where the gradient asks for it (SPD, arXiv 2411.01713).

    W~ = W - change;  if <g, W - W0> > 0:  W~ - wd * ratio * (W~ - W0),
    ratio = clip((norm(W~ - W0) - norm(W - W0)) / norm(W~ - W0), 0, 1). The ratio carries the rate: wd is of order 1.
    """
    moved = weight - change
    distance = (moved - origin).norm()
    if (g * (weight - origin)).sum() <= 0 or distance == 0:
        return moved
    ratio = torch.clamp((distance - (weight - origin).norm()) / distance, 0, 1)
    return moved - weight_decay * ratio * (moved - origin)
