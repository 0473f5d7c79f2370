"""Momentum: the update follows an average of the last normalised gradients."""

import dataclasses

import torch
from torch import Tensor

from .core import Measured, State, StateSpec, StepContext, Transform, bias_correction


@dataclasses.dataclass(frozen=True)
class Momentum(Transform):
    """Averages the update over steps: m <- beta1 m + (1 - beta1) u, passed on as m / (1 - beta1^t).

    Args:
        beta1: decay of the average. Larger is smoother and turns later.
        corrected: whether the zero start is corrected for; CAME's paper does not.
    """

    beta1: float
    corrected: bool = True

    def states(self) -> tuple[StateSpec, ...]:
        """Declares the average; it is what 8-bit storage is for."""
        return (StateSpec("exp_avg", "matrix", "average of the normalised gradient", quantizes=True),)

    def apply(
        self, update: Tensor, state: State, measured: Measured | None, context: StepContext
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Averages, and carries the input on as `normalized`, which the confidence compares with the average."""
        exp_avg = context.once(torch.lerp(state["exp_avg"], update, 1 - self.beta1))
        correction = context.once(bias_correction(self.beta1 if self.corrected else 0.0, context.step))
        return exp_avg / correction, {"exp_avg": exp_avg, "normalized": update}


@dataclasses.dataclass(frozen=True)
class MultiScaleMomentum(Transform):
    """Follows averages of several horizons at once: m_hat = sum_k (1/k) m_k / (1 - b_k^t) / sum_k (1/k).

    Scale k has b_k = beta1^(1/k) and averages k times as long. Scale 1 is the ordinary `exp_avg`, and it alone is what
    the confidence and the rate compare the gradient with. The seeds name the scales and no formula; slow beside fast
    averages are AdEMAMix's idea (arXiv 2409.03137), the weights 1/k are ours.

    Args:
        beta1: decay of scale 1.
        scales: the horizons in units of scale 1, which is among them. More of them steady the direction; longer ones
            look further back on average, n / sum_k (1/k) times as far as scale 1 alone. Each costs a momentum's bytes.
        corrected: whether the zero starts are corrected for.
    """

    beta1: float
    scales: tuple[int, ...]
    corrected: bool = True

    def states(self) -> tuple[StateSpec, ...]:
        """Declares one average for each scale."""
        slow = [k for k in self.scales if k != 1]
        meanings = {scale_name(k): f"average of the normalised gradient over a {k} times longer horizon" for k in slow}
        longer = tuple(StateSpec(name, "matrix", meaning, quantizes=True) for name, meaning in meanings.items())
        return (*Momentum(self.beta1).states(), *longer)

    def apply(
        self, update: Tensor, state: State, measured: Measured | None, context: StepContext
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Averages over every horizon and combines; carries the input on as `normalized`, as `Momentum` does."""
        combined, changed = torch.zeros_like(update), {"normalized": update}
        for k in self.scales:
            beta = self.beta1 ** (1 / k)
            average = context.once(torch.lerp(state[scale_name(k)], update, 1 - beta))
            changed[scale_name(k)] = average
            correction = context.once(bias_correction(beta if self.corrected else 0.0, context.step) * k)
            combined = combined + average / correction
        return combined / sum(1 / k for k in self.scales), changed


def scale_name(k: int) -> str:
    """Returns the name of the state that averages over k horizons: `exp_avg` or `exp_avg_k5`."""
    return "exp_avg" if k == 1 else f"exp_avg_k{k}"
