"""Cases as data: an optimizer's options beside those of its slow reference."""

import dataclasses
from typing import Any

import torch

from hf_automagic import Automagic
from tests.reference import Pair, ParamOptions, ReferenceConfig, ReferenceOptimizer


@dataclasses.dataclass(frozen=True)
class Case:
    """One configuration, said twice: to the engine and to the reference."""

    name: str
    options: dict[str, Any]
    reference: dict[str, Any]
    tolerance: float = 2e-5  # of the distance that the weights went


TUNED = {"self_tuning": True, "search": False, "rail_steps": 100, "betas": (0.8, 0.99, 0.999)}
SEARCHED = TUNED | {"search": True, "kappa": 0.3, "drift": 0.5}
PLAIN = {"quantize_states": False}
SEARCH = PLAIN | {"lr_search": True}

CASES = [
    Case("default in fp32", PLAIN, TUNED),
    Case("default", {}, TUNED, tolerance=2e-2),  # a code on the edge between two may fall to either side
    Case("a rail that falls early", PLAIN | {"rail_steps": 3}, TUNED | {"rail_steps": 3}),
    Case("a rail that stays", PLAIN | {"rail_steps": 0}, TUNED | {"rail_steps": 0}),
    Case("search", SEARCH, SEARCHED),
    Case("search without drift", SEARCH | {"lr_drift": 0.0}, SEARCHED | {"drift": 0.0}),
    Case("longer betas", PLAIN | {"betas": (0.9, 0.999, 0.9999)}, TUNED | {"betas": (0.9, 0.999, 0.9999)}),
    Case("your own rate", PLAIN | {"self_tuning": False}, {"betas": (0.8, 0.99, 0.999)}),
    Case("a search for each group", SEARCH | {"lr_pool": "group"}, SEARCHED | {"lr_pool": "group"}),
    Case(
        "element rates",
        PLAIN | {"lr_granularity": "element", "sync_frequency": 5},
        TUNED | {"granularity": "element", "sync_frequency": 5},
    ),
    Case(
        "element rates around a search",
        SEARCH | {"lr_granularity": "element", "sync_frequency": 5},
        SEARCHED | {"granularity": "element", "sync_frequency": 5},
    ),
    Case("weight decay", PLAIN | {"weight_decay": 0.1}, TUNED),
    Case("full second moment", PLAIN | {"factored": False}, TUNED | {"factored": False}),
    Case("clipped by norm", PLAIN | {"max_grad_norm": 0.01}, TUNED | {"max_grad_norm": 0.01}),
    Case("tight clip", PLAIN | {"clip_threshold": 0.3}, TUNED | {"clip_threshold": 0.3}),
    Case(
        "came of the paper",
        PLAIN | {"came_mode": "paper", "self_tuning": False},
        {"came_mode": "paper", "betas": (0.8, 0.99, 0.999)},
    ),
    Case(
        "adam's order",
        PLAIN | {"momentum_order": "before", "factored": False, "self_tuning": False},
        {"momentum_order": "before", "factored": False, "confidence": False, "clip_threshold": 1e30}
        | {"betas": (0.8, 0.99, 0.999)},
    ),
]

# odd shapes are the rule; 16 x 512 and 40 x 130 are large enough for 8 bits
SHAPES = [(16, 512), (512, 16), (40, 130), (7, 33), (8, 64), (1, 5), (5, 1), (17,), (4, 3, 3, 3), (1,), ()]
START_RATES = (1e-4, 3e-4)  # of the two groups


class Twins:
    """An engine and its reference with the same weights, stepped with the same gradients."""

    def __init__(
        self,
        case: Case,
        shapes: list[tuple[int, ...]] = SHAPES,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> None:
        """Builds both with two groups, the shapes dealt out in turn; the reference stays on the CPU."""
        self.generator = torch.Generator().manual_seed(0)
        self.params = [torch.nn.Parameter(self._normal(s).mul(0.02).to(device, dtype)) for s in shapes]
        groups = [{"params": self.params[i::2], "lr": lr} for i, lr in enumerate(START_RATES)]
        self.engine = Automagic(groups, **case.options)
        self.reference = ReferenceOptimizer(
            [(str(i), p.cpu(), "adapter", self._options(i, p, case)) for i, p in enumerate(self.params)],
            ReferenceConfig(**case.reference),
        )
        self.start = [p.detach().double().cpu() for p in self.params]

    def _normal(self, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator)

    def _options(self, i: int, param: torch.Tensor, case: Case) -> ParamOptions:
        return ParamOptions(
            lr=START_RATES[i % 2],
            weight_decay=case.options.get("weight_decay", 0.0),
            group=str(i % 2),
            quantized=case.options.get("quantize_states", True) and param.numel() >= 4096,
        )

    def step(self, scale: float = 1e-3, missing: tuple[int, ...] = ()) -> None:
        """Takes a step with noise around a steady gradient; parameters in `missing` get none."""
        steady = torch.Generator().manual_seed(7)
        grads = {}
        for i, p in enumerate(self.params):
            grad = (torch.randn(p.shape, generator=steady) * 0.5 + self._normal(tuple(p.shape))) * scale
            p.grad = None if i in missing else grad.to(p.device, p.dtype)
            grads[str(i)] = None if p.grad is None else p.grad.double().cpu()
        self.engine.step()
        self.reference.step(grads)

    def errors(self) -> list[float]:
        """Gives for each parameter the distance between the two, relative to how far the weights went."""
        errors = []
        for i, (param, start) in enumerate(zip(self.params, self.start, strict=True)):
            target = self.reference.params[str(i)].value
            errors.append(
                float((param.detach().double().cpu() - target).norm() / (target - start).norm().clamp_min(1e-30))
            )
        return errors


__all__ = ["CASES", "SHAPES", "Case", "Pair", "Twins"]
