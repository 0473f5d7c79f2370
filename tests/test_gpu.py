"""On a GPU: the same results as on the CPU, and not one question to the device in a step."""

import copy
import io

import pytest
import torch

from hf_automagic import Automagic
from tests.cases import CASES, SHAPES, Case, Twins

pytestmark = pytest.mark.gpu
DEVICE = "cuda"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_matches_the_reference_on_the_gpu(case: Case):
    twins = Twins(case, device=DEVICE)
    for _ in range(12):
        twins.step()
    assert max(twins.errors()) < case.tolerance


OPTIONS = [
    {},
    {"lr_granularity": "element"},
    {"max_grad_norm": 1.0},
    {"context": True},
    {"cautious": True, "weight_decay": 0.01, "momentum_scales": (1, 5)},
    {"error_correction": True},
]


def _params(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter((torch.randn(s, generator=generator) * 0.02).to(DEVICE, dtype)) for s in SHAPES]


def _fill(params: list[torch.nn.Parameter], seed: int) -> None:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, device=DEVICE).to(p.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_step_asks_the_device_nothing(options, dtype):
    params = _params(dtype)
    optimizer = Automagic(params, **options)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    for seed in range(2):  # states are made in the first step
        _fill(params, seed)
        optimizer.step(loss=torch.ones((), device=DEVICE))
    _fill(params, 3)
    loss = torch.ones((), device=DEVICE)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step(loss=loss)
        scheduler.step()
        optimizer.step(loss=loss)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_runs_and_a_resumed_one_give_the_same_bits(dtype):
    first, second = _params(dtype), _params(dtype)
    optimizers = [Automagic(first), Automagic(second)]
    for seed in range(6):
        for params, optimizer in zip((first, second), optimizers, strict=True):
            _fill(params, seed)
            optimizer.step()
    assert all(map(torch.equal, first, second))
    file = io.BytesIO()
    torch.save(optimizers[0].state_dict(), file)
    third = copy.deepcopy(first)
    resumed = Automagic(third)
    resumed.load_state_dict(torch.load(io.BytesIO(file.getvalue()), map_location="cpu", weights_only=True))
    for seed in range(6, 12):
        for params, optimizer in ((first, optimizers[0]), (third, resumed)):
            _fill(params, seed)
            optimizer.step()
    assert all(map(torch.equal, first, third))


def test_a_checkpoint_moves_between_cpu_and_gpu():
    on_gpu = _params(torch.float32)
    optimizer = Automagic(on_gpu)
    _fill(on_gpu, 0)
    optimizer.step()
    on_cpu = [torch.nn.Parameter(p.detach().cpu()) for p in on_gpu]
    moved = Automagic(on_cpu)
    moved.load_state_dict(optimizer.state_dict())
    _fill(on_gpu, 1)
    for p, q in zip(on_gpu, on_cpu, strict=True):
        q.grad = p.grad.cpu()
    optimizer.step()
    moved.step()
    for p, q in zip(on_gpu, on_cpu, strict=True):
        assert torch.allclose(p.detach().cpu(), q.detach(), rtol=0, atol=1e-6)
