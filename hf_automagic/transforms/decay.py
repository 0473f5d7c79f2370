"""Weight decay: weights shrink a little each step, or only along with the step, or only where a tensor drifts off."""

import dataclasses

import torch
from torch import Tensor

from .core import Measured, State, StateSpec, StepContext, Transform


@dataclasses.dataclass(frozen=True)
class DecoupledWeightDecay(Transform):
    """Shrinks the weights by rate times weight_decay, apart from the gradient (arXiv 1711.05101).

    Stands after the rate was applied, and decays with that same rate: at rate zero nothing moves.

    Args:
        weight_decay: share of a weight lost per unit of rate. Larger pulls harder towards zero; a LoRA's zero is the
            base model.
    """

    weight_decay: float

    def apply(
        self, update: Tensor, state: State, measured: Measured | None, context: StepContext
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Adds the decay to the step."""
        return update + context.param * (context.lr * self.weight_decay), {}


@dataclasses.dataclass(frozen=True)
class CautiousWeightDecay(Transform):
    """Shrinks a weight only where the step does not push it away from zero: decays where update * W >= 0.

    Cautious weight decay (arXiv 2510.12402): the minima of the loss itself stay where they are, for a LoRA too, whose
    zero is the base model. Compares signs, because the product underflows.

    Args:
        weight_decay: share of a weight lost per unit of rate, as in `DecoupledWeightDecay`; about half as many weights
            lose it.
    """

    weight_decay: float

    def apply(
        self, update: Tensor, state: State, measured: Measured | None, context: StepContext
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Adds the decay to the step, element by element."""
        along = update.sign() * context.param.sign() >= 0
        return update + context.param * (context.lr * self.weight_decay) * along, {}


@dataclasses.dataclass(frozen=True)
class SelectiveWeightDecay(Transform):
    """Pulls a tensor back to its origin W0 only where a step takes it further away and the gradient wants it back.

    Selective projection decay (arXiv 2411.01713): with W' = W - update, if <g, W - W0> > 0, W' <- W' - wd * ratio *
    (W' - W0), ratio = clip((|W' - W0| - |W - W0|) / |W' - W0|, 0, 1). The ratio carries the rate, so that wd is of
    order 1, not 1e-2.

    The origin of an adapter is zero, which costs nothing. That of a pretrained weight is the weight of its first step
    and has to be kept, in 4 bytes an element, as much as half of Adam's state.

    Args:
        weight_decay: share of the step's outward part that is taken back; 1 projects onto the old distance.
        keeps_origin: whether the origin is the weights at the first step, kept as `initial_param`; else it is zero.
    """

    weight_decay: float
    keeps_origin: bool

    def states(self) -> tuple[StateSpec, ...]:
        """Declares the origin where it is not zero."""
        meaning = "weights at the first step, which selective decay pulls back to"
        return (StateSpec("initial_param", "matrix", meaning),) if self.keeps_origin else ()

    def measure(self, update: Tensor, state: State, context: StepContext) -> Measured:
        """Sums what the distances before and after the step follow from."""
        away = context.param - self._origin(state, context)
        products = {"wanted": context.grad * away, "inward": update * away, "step": update**2, "away": away**2}
        return Measured(matrix={name: product.sum((-1, -2)) for name, product in products.items()})

    def apply(
        self, update: Tensor, state: State, measured: Measured | None, context: StepContext
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Adds the pull to the step."""
        assert measured is not None
        ratio = self._outward_share(measured.matrix)[:, None, None]
        origin = self._origin(state, context)
        pulled = update + (self.weight_decay * ratio) * (context.param - update - origin)
        return pulled, {"initial_param": origin} if isinstance(origin, Tensor) else {}

    def _origin(self, state: State, context: StepContext) -> Tensor | float:
        if not self.keeps_origin:
            return 0.0
        is_first = (context.step <= 1)[:, None, None]
        return torch.where(is_first, context.param, state["initial_param"])

    @staticmethod
    def _outward_share(sums: dict[str, Tensor]) -> Tensor:
        """Returns the ratio [n], 0 where the condition does not hold.

        The difference of the two squared distances is step^2 - 2 <step, away>; taken of the distances, it would
        cancel.
        """
        grown = sums["step"] - 2 * sums["inward"]
        distance = (sums["away"] + grown).clamp_min(0.0).sqrt()
        bound = distance * (distance + sums["away"].sqrt())
        pulls = (sums["wanted"] > 0) & (bound > 0)
        return torch.where(pulls, grown / torch.where(bound > 0, bound, 1.0), 0.0).clamp(0.0, 1.0)
