"""States in few bits move as their fp32 twins do, for as long as a long training run."""

from typing import Any

import pytest
import torch

from hf_automagic import Automagic

SHAPES = [(16, 40), (16, 40)]
STORED: dict[str, Any] = {"mixed_precision": False, "vector_precision": "log16"}


def run(steps: int, **options: Any) -> tuple[list[torch.nn.Parameter], Automagic]:
    """Follows gradients that do not depend on the weights: noise around a mean whose size and direction wander."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    means, spreads = ([torch.randn(s, generator=generator) for s in SHAPES] for _ in range(2))
    optimizer = Automagic(params, lr=1e-3, self_tuning=True, lr_granularity="element", **options)
    for step in range(steps):
        size = 1 + 0.5 * torch.sin(torch.tensor(12.0 * step / steps))
        for param, mean, spread in zip(params, means, spreads, strict=True):
            noise = torch.randn(param.shape, generator=generator) * spread.exp()
            param.grad = size * (0.3 * mean * torch.cos(torch.tensor(6.0 * step / steps)) + noise)
        optimizer.step()
    return params, optimizer


def compare(steps: int, vectors: float, mask: float, weights: float) -> None:
    exact, fp32 = run(steps, quantize_states=False)
    params, stored = run(steps, **STORED)
    stored.set_quantization(False)
    for twin, param in zip(exact, params, strict=True):
        expected, actual = fp32.state[twin], stored.state[param]
        for name in ("exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_res_row", "exp_avg_res_col"):
            ratio = actual[name] / expected[name]
            assert (ratio - 1).square().mean().sqrt() < vectors, name
            assert (ratio.mean() - 1).abs() < vectors / 2, name
        difference = actual["lr_mask"].float() - expected["lr_mask"].float()
        moved = (expected["lr_mask"].float() - 128).std()
        assert moved > 3
        assert difference.std() < mask * moved
        assert difference.mean().abs() < 0.5
        assert (param - twin).norm() < weights * twin.norm()


def test_for_300_steps():
    compare(300, vectors=0.01, mask=0.2, weights=0.05)


@pytest.mark.slow
@pytest.mark.matrix("T25")
def test_for_20000_steps():
    # a mask counts votes, some of which are close: masks differ by a tenth of their spread, and weights by as much
    compare(20_000, vectors=0.01, mask=0.15, weights=0.15)
