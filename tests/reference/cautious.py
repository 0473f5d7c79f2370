"""Stage 6, the cautious mask (arXiv 2411.16085): drop the elements whose direction disagrees with the gradient."""

from typing import Literal

import torch
from torch import Tensor


def agreement(d: Tensor, g: Tensor) -> Tensor:
    """Marks agreement: phi = 1 where sign(d) = sign(g) and both are non-zero. By signs: the product d g underflows."""
    return ((d.sign() == g.sign()) & (d != 0)).to(d.dtype)


def agreeing_share(d: Tensor, g: Tensor) -> float:
    """Mean of phi over the elements where both d and g are non-zero; 1 if there is none."""
    voting = (d != 0) & (g != 0)
    return agreement(d, g)[voting].mean().item() if voting.any() else 1.0


def mask_cautiously(d: Tensor, g: Tensor, scale: Literal["share", "paper"] = "share") -> Tensor:
    """Keeps agreeing elements and scales them up for the dropped ones: d * phi / max(share of phi, 1/2).

    scale="paper" is the published d * phi * numel / (nnz(phi) + 1), unbounded where few elements agree.
    """
    phi = agreement(d, g)
    if scale == "paper":
        return d * phi * (d.numel() / (torch.count_nonzero(phi).item() + 1))
    return d * phi / max(agreeing_share(d, g), 0.5)
