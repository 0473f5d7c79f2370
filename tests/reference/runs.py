"""What the tests share: seeded random tensors, and running one parameter for a few steps."""

from typing import Any

import torch
from torch import Tensor

from .config import ParamOptions, ReferenceConfig
from .optimizer import ReferenceOptimizer


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers, float64; the same seed and shape give the same tensor."""
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def noisy_gradients(shape: tuple[int, ...], steps: int, snr: float = 0.5, seed: int = 0) -> list[Tensor]:
    """Gradients snr * mean + independent noise, with rows of very different size."""
    size = 10.0 ** noise(*shape[:1], *[1] * (len(shape) - 1), seed=seed)
    mean = noise(*shape, seed=seed + 1)
    return [(snr * mean + noise(*shape, seed=1000 * (seed + 1) + step)) * size for step in range(steps)]


def one(
    value: Tensor, config: ReferenceConfig | None = None, role: str = "full", **options: Any
) -> ReferenceOptimizer:
    """An optimizer of a single parameter named "w"; options are those of `ParamOptions`."""
    return ReferenceOptimizer([("w", value, role, ParamOptions(**options))], config)


def run(optimizer: ReferenceOptimizer, gradients: list[Tensor]) -> Tensor:
    """Steps through the gradients and returns where "w" ends."""
    for g in gradients:
        optimizer.step({"w": g})
    return optimizer.params["w"].value
