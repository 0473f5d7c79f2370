"""Compiled stacks compute what eager stacks compute, and are compiled once."""

import logging

import pytest
import torch

from hf_automagic import Automagic
from hf_automagic.kernels import compile_backend

SHAPES = [(16, 512), (16, 512), (40, 130), (17,)]


def train(backend: str, dtype: torch.dtype = torch.float32, steps: int = 4, **options) -> tuple[list, Automagic]:
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter((torch.randn(s, generator=generator) * 0.02).to(dtype)) for s in SHAPES]
    optimizer = Automagic(params, backend=backend, **options)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 5e-5 / (step + 1)
        for i, p in enumerate(params):
            grad = (torch.randn(p.shape, generator=generator) * 1e-3 + 5e-4).to(dtype)
            p.grad = None if (i, step) == (1, 2) else grad
        optimizer.step()
    return params, optimizer


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_graph_a_bucket_computes_what_eager_stacks_compute(dtype):
    eager, _ = train("eager", dtype)
    compiled, optimizer = train("compile", dtype)
    assert optimizer.backends() == {("compile", ""): 3, ("eager", "rows end with a short block"): 1}
    starts, _ = train("eager", dtype, steps=0)
    for a, b, start in zip(eager, compiled, starts, strict=True):
        way = (a.detach() - start.detach()).float().norm()
        assert float((a - b).detach().float().norm()) <= (1e-4 if dtype == torch.float32 else 2e-2) * float(way)


@pytest.mark.slow
def test_rates_and_steps_compile_nothing_anew():
    _, optimizer = train("compile", steps=1)
    counted = torch.compiler.set_stance("fail_on_recompile")
    with counted:
        for step in range(3):
            optimizer.param_groups[0]["lr"] = 1e-5 * (step + 1)
            for p in optimizer.param_groups[0]["params"]:
                p.grad = torch.randn_like(p)
            optimizer.step()


def test_without_a_compiler_it_steps_in_eager_stacks_and_says_so_once(monkeypatch, caplog):
    def fail(*_, **__):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(compile_backend.torch, "compile", fail)
    compile_backend.find_compile_problem.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            eager, _ = train("eager")
            fallen, optimizer = train("compile")
    finally:
        compile_backend.find_compile_problem.cache_clear()
    assert all(map(torch.equal, eager, fallen))
    assert [record.message for record in caplog.records if "no C++ compiler" in record.message][1:] == []
    assert "no C++ compiler" in optimizer.describe()
