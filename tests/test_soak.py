"""Twenty thousand steps of everything that can happen: finite weights, memory that stays, counters that are right."""

import gc
import random
import sys

import psutil
import pytest
import torch

from hf_automagic import Automagic

SPOILT_EVERY = 500


def soak(steps: int, warmup: int) -> None:
    chance = random.Random(0)
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 40), (40, 4), (40, 4), (5,)]
    dtypes = [torch.float32, torch.bfloat16, torch.bfloat16, torch.float32]
    params = [torch.nn.Parameter(torch.zeros(s, dtype=d)) for s, d in zip(shapes, dtypes, strict=True)]
    optimizer = Automagic(
        [
            {"params": params[:1], "role": "lora_A", "pairs": [-1], "scalings": [1.0]},
            {"params": params[1:3], "role": "lora_B"},
            {"params": params[3:], "role": "bias"},
        ],
        lr=1e-3,
        context=True,
        cautious=True,
        lr_granularity="element",
        momentum_scales=(1, 5),
        error_correction=True,
        min_8bit_size=0,
        weight_decay=0.01,
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=1000, T_mult=2)
    process, taken, skipped, applied = psutil.Process(), [0] * len(params), 0, 0
    for step in range(1, steps + 1):
        spoilt = step % SPOILT_EVERY == 0
        present = [spoilt or chance.random() < 0.8 for _ in params]
        for p, comes in zip(params, present, strict=True):
            noise = torch.randn(p.shape, generator=generator) + 0.3
            p.grad = (noise * (0.1 + chance.random())).to(p.dtype) if comes else None
        if spoilt:
            params[chance.randrange(len(params))].grad.view(-1)[0] = torch.nan
        optimizer.step(loss=1.0 / step**0.5 + 0.01 * chance.random())
        scheduler.step()
        if any(present):
            skipped, applied = skipped + spoilt, applied + (not spoilt)
            taken = [n + (comes and not spoilt) for n, comes in zip(taken, present, strict=True)]
        if step in (warmup, steps):
            gc.collect()
            blocks, resident = sys.getallocatedblocks(), process.memory_info().rss
            if step == warmup:
                first = blocks, resident, optimizer.memory_stats().total_bytes

    assert all(bool(p.isfinite().all()) and bool(p.any()) for p in params)
    for state in optimizer.state.values():
        assert all(bool(t.isfinite().all()) for t in state.values() if t.is_floating_point())
    counters = {name: int(value) for name, value in optimizer.param_groups[0]["counters"].items()}
    assert (counters["applied"], counters["skipped"]) == (applied, skipped)
    assert skipped == steps // SPOILT_EVERY
    assert [int(optimizer.state[p]["step"]) for p in params] == taken
    assert optimizer.param_groups[0]["host_steps"] == applied + skipped
    recorded = int(optimizer.param_groups[0]["events"]["recorded"])
    assert recorded >= skipped
    assert len(optimizer.events()) == min(recorded, 64)
    assert optimizer.memory_stats().total_bytes == first[2]
    assert blocks - first[0] < 2000  # of Python's heap
    assert resident - first[1] < 20 * 2**20
    assert 0 < optimizer.c_optim.compute_contextual_lr_multiplier() <= 2


@pytest.mark.matrix("T25")
def test_for_300_steps(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tests.test_soak.SPOILT_EVERY", 50)
    soak(300, warmup=100)


@pytest.mark.slow
@pytest.mark.matrix("T25")
def test_for_20000_steps():
    soak(20_000, warmup=2000)
