"""The optimizer that all this descends from, as a benchmark arm: ostris' Automagic v1 (ai-toolkit, rule of 2025-04).

One departure: the mask is exact fp32. The original stores it as int8 with one scale per tensor, where bumps of 1e-6
are rounded away once any element exceeds 2.54e-4. Low-precision parameters are rounded to nearest, not stochastically.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class AncestorAutomagic(torch.optim.Optimizer):
    """Adafactor without momentum, with a rate per element: bumped up while the update keeps its sign, else down.

    R, C factored averages of g^2 + e1 (full v below two dimensions), uncorrected; u = g rsqrt(R / mean(R)) rsqrt(C);
    u <- u / max(1, rms(u) / clip);  a = +1 where [u > 0] is as in the last step (first: as False), else -1;
    mask <- clamp(mask + a * lr_bump, min_lr, max_lr);  W <- W - wd * mask * W - mask * u.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-6,
        min_lr: float = 1e-7,
        max_lr: float = 1e-3,
        lr_bump: float = 1e-6,
        eps: float = 1e-30,
        clip_threshold: float = 1.0,
        beta2: float = 0.999,
        weight_decay: float = 0.0,
    ) -> None:
        """lr: where every element's rate starts; above 1e-3 the original falls back to 1e-6, and so does this."""
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.start_lr = lr if lr <= 1e-3 else 1e-6
        self.min_lr, self.max_lr, self.lr_bump = min_lr, max_lr, lr_bump
        self.eps, self.clip_threshold, self.beta2 = eps, clip_threshold, beta2

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Moves every parameter that has a gradient, returns the loss; as in the original, no scheduler can act."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._step_one(p, p.grad, group["weight_decay"])
        return loss

    def _step_one(self, p: Tensor, grad: Tensor, weight_decay: float) -> None:
        """One parameter, in fp32 at least."""
        dtype = torch.promote_types(p.dtype, torch.float32)
        weight, g, state = p.to(dtype), grad.to(dtype), self.state[p]
        if not state:
            state["lr_mask"] = torch.full_like(weight, self.start_lr)
            state["last_polarity"] = torch.zeros_like(weight, dtype=torch.bool)
        u = self._normalise(g, state)
        u = u / max(1.0, u.square().mean().sqrt().item() / self.clip_threshold)

        polarity = u > 0
        agreement = 2 * (polarity == state["last_polarity"]).to(dtype) - 1
        state["lr_mask"] = (state["lr_mask"] + self.lr_bump * agreement).clamp(self.min_lr, self.max_lr)
        state["last_polarity"] = polarity

        p.copy_(weight - weight_decay * state["lr_mask"] * weight - state["lr_mask"] * u)

    def _normalise(self, g: Tensor, state: dict[str, Tensor]) -> Tensor:
        """Divides g by the root of its second moment: u = g / sqrt(v), v factored over the last two axes or full."""
        q = g.square() + self.eps
        if g.ndim < 2:
            state["exp_avg_sq"] = self._ema(state.get("exp_avg_sq"), q)
            return g / state["exp_avg_sq"].sqrt()
        row = state["exp_avg_sq_row"] = self._ema(state.get("exp_avg_sq_row"), q.mean(dim=-1))
        col = state["exp_avg_sq_col"] = self._ema(state.get("exp_avg_sq_col"), q.mean(dim=-2))
        row_factor = (row / row.mean(dim=-1, keepdim=True)).rsqrt()
        return g * row_factor.unsqueeze(-1) * col.rsqrt().unsqueeze(-2)

    def _ema(self, old: Tensor | None, new: Tensor) -> Tensor:
        """b2 old + (1 - b2) new, old = 0 at first."""
        return (1 - self.beta2) * new if old is None else self.beta2 * old + (1 - self.beta2) * new
