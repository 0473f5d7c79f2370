"""The learning rate: one pooled rate that follows the gradients' agreement, and rates of elements around it."""

import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from .core import Measured, State, StateSpec, StepContext, Transform

LOG_RATIO = 4 * math.log(10) / 255  # one code of the element mask: 256 of them span the seeds' 1e-7 to 1e-3
CENTRE = 128  # the code of an element that steps at the pooled rate


@dataclasses.dataclass(frozen=True)
class MeasureAgreement(Transform):
    """Compares the normalised gradient with the momentum of the steps before: the pooled rate follows their cosine.

    Independent noise has cosine zero; steps too short keep it positive, steps too long make it negative (normalised
    hypergradient descent, arXiv 1703.04782, in the log domain). Stands before the momentum.
    """

    def measure(self, update: Tensor, state: State, context: StepContext) -> Measured:
        """Sums <u, m>, |u|^2 and |m|^2 over all parameters."""
        momentum = state["exp_avg"]
        products = {"agreement": update * momentum, "update": update.square(), "momentum": momentum.square()}
        return Measured(pool={name: product.sum() for name, product in products.items()})

    def apply(
        self, update: Tensor, state: State, measured: Measured | None, context: StepContext
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Changes nothing in this step."""
        return update, {}


def agreement_cosine(pool: Mapping[str, Tensor]) -> Tensor:
    """Returns the cosine of the pooled sums  # [], in [-1, 1]; 0 where there is no momentum yet."""
    norm = (pool["update"].sqrt() * pool["momentum"].sqrt()).to(torch.float32)
    return torch.where(norm > 0, pool["agreement"] / torch.where(norm > 0, norm, 1.0), 0.0).clamp(-1.0, 1.0)


def log_rate_step(pool: Mapping[str, Tensor], numel: int, speed: float, drift: float) -> Tensor:
    """Returns the change of the rate's logarithm: speed * (clip(cosine * sqrt(numel / 8) / 4, -1, 1) + drift)  # []

    Of n independent elements the cosine has a spread of 1 / sqrt(n). Gradients depend on one another, so n / 8 is
    counted, and the vote is full at four spreads (our heuristic). Near a good rate the votes cancel, and without a
    drift the rate would wander away from its upper rail, the best prior there is. Without any gradient nothing moves.

    Args:
        pool: sums of `MeasureAgreement` over all parameters.
        numel: elements that took part.
        speed: the change at full agreement, in units of log(rate).
        drift: what the votes are lifted by; 0 is the plain hypergradient rule.
    """
    vote = (agreement_cosine(pool) * (math.sqrt(numel / 8) / 4)).clamp(-1.0, 1.0)
    return torch.where(pool["update"] > 0, speed * (vote + drift), 0.0)


@dataclasses.dataclass(frozen=True)
class VoteOnElements(Transform):
    """Raises an element's rate while its gradient agrees with a clear momentum, lowers it where the sign flips.

    The mask is an integer on a logarithmic grid, rate factor 1.0368^(code - 128), so that it moves by whole codes and
    is stored without rounding (the idea is Automagic's lr_mask, github.com/ostris/ai-toolkit). Stands before the
    momentum.

    Args:
        beta1: decay of the momentum; sets when a momentum counts as clear.
        band: the mask stays within this factor of the pooled rate. Wider lets elements differ more.
        recentre_every: steps after which the mean code is brought back to 128, so that the mask only tells elements
            apart.
    """

    beta1: float
    band: float
    recentre_every: int

    def states(self) -> tuple[StateSpec, ...]:
        """Declares the mask."""
        meaning = "logarithmic code of each element's rate factor, 128 = 1"
        return (StateSpec("lr_mask", "matrix", meaning, dtype=torch.uint8, initial=CENTRE),)

    def measure(self, update: Tensor, state: State, context: StepContext) -> Measured:
        """Sums the offsets of the mask."""
        return Measured(matrix={"offsets": self._voted(update, state).sum((-1, -2))})

    def apply(
        self, update: Tensor, state: State, measured: Measured | None, context: StepContext
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Counts the votes; the update passes unchanged."""
        assert measured is not None
        due = (context.step % self.recentre_every == 0)[:, None, None]
        mean = (measured.matrix["offsets"] / context.numel).round()[:, None, None]
        offsets = self._voted(update, state) - torch.where(due, mean, 0.0)
        limit = self._limit()
        return update, {"lr_mask": offsets.clamp(-limit, limit) + CENTRE}

    def _voted(self, update: Tensor, state: State) -> Tensor:
        momentum = state["exp_avg"]
        clear = momentum.abs() > 2 * math.sqrt((1 - self.beta1) / (1 + self.beta1))
        vote = torch.where(clear, update.sign() * momentum.sign(), 0.0)
        limit = self._limit()
        return (state["lr_mask"] - CENTRE + vote).clamp(-limit, limit)

    def _limit(self) -> int:
        return math.floor(math.log(self.band) / LOG_RATIO)


@dataclasses.dataclass(frozen=True)
class ScaleByElementRate(Transform):
    """Multiplies each element by its own rate factor, 1.0368^(lr_mask - 128)."""

    def apply(
        self, update: Tensor, state: State, measured: Measured | None, context: StepContext
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Scales the elements."""
        return update * element_factor(state["lr_mask"]), {}


def element_factor(lr_mask: Tensor) -> Tensor:
    """Decodes the mask to rate factors  # any shape, float32"""
    return torch.exp((lr_mask.to(torch.float32) - CENTRE) * LOG_RATIO)


@dataclasses.dataclass(frozen=True)
class ScaleByRate(Transform):
    """Multiplies the direction by the rate: from here on the update is in units of the weights."""

    def apply(
        self, update: Tensor, state: State, measured: Measured | None, context: StepContext
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Scales the update."""
        return update * context.lr, {}
