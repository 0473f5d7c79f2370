"""Compiled stacks compute what eager stacks compute, and are compiled once."""

import functools
import logging

import pytest
import torch

from hf_automagic import Automagic
from hf_automagic.kernels import compile_backend
from hf_automagic.kernels.choice import bit_mask, choose, choose_or_zero
from hf_automagic.optim import compiled_bucket
from hf_automagic.quantization import random_halves, step_keys

SHAPES = [(16, 512), (16, 512), (40, 130), (17,)]


def train(
    backend: str, dtype: torch.dtype = torch.float32, steps: int = 4, shapes=SHAPES, **options
) -> tuple[list, Automagic]:
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter((torch.randn(s, generator=generator) * 0.02).to(dtype)) for s in shapes]
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
    assert optimizer.backends() == {("compile", ""): 4}
    starts, _ = train("eager", dtype, steps=0)
    for a, b, start in zip(eager, compiled, starts, strict=True):
        way = (a.detach() - start.detach()).float().norm()
        assert float((a - b).detach().float().norm()) <= (1e-4 if dtype == torch.float32 else 2e-2) * float(way)


@pytest.mark.slow
@pytest.mark.parametrize(("offset", "numel"), [(0, 99), (7, 100)])
def test_a_graph_draws_what_eager_code_draws(offset: int, numel: int):
    keys = step_keys(3, torch.arange(3), torch.ones(3))
    drawn = torch.compile(random_halves, dynamic=False)(keys, offset, numel)
    assert torch.equal(drawn, random_halves(keys, offset, numel))


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["softsign", "affine"])
def test_rows_that_end_with_a_short_block_get_the_codes_of_eager_stacks(codec):
    shapes = [(40, 130), (64, 192), (7, 300)]
    options = {"codec": codec, "min_8bit_size": 64, "error_correction": codec == "affine"}
    _, eager = train("eager", shapes=shapes, **options)
    _, compiled = train("compile", shapes=shapes, **options)
    assert compiled.backends() == {("compile", ""): 3}
    for a, b in zip(eager.state.values(), compiled.state.values(), strict=True):
        apart = (a["exp_avg_codes"].int() - b["exp_avg_codes"].int()).abs()
        assert int(apart.max()) <= 1  # a value half-way between two codes
        assert float((apart > 0).float().mean()) < 1e-3
        assert torch.allclose(a["exp_avg_scale"].float(), b["exp_avg_scale"].float(), rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "compile"])
def test_a_skipped_step_leaves_no_trace_in_weights_and_states(backend):
    params, optimizer = train(backend, steps=2)
    kept = [p.detach().clone() for p in params]
    states = [{name: value.clone() for name, value in optimizer.state[p].items()} for p in params]
    for p in params:
        p.grad = torch.full_like(p, float("nan"))
    optimizer.step()
    assert all(map(torch.equal, params, kept))
    for p, state in zip(params, states, strict=True):
        assert all(torch.equal(optimizer.state[p][name], value) for name, value in state.items())


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float16, torch.float32, torch.float64], ids=str)
def test_bits_choose_as_where_does(dtype):
    new, old = torch.tensor([3.0, 0.0, 100.0]).to(dtype), torch.tensor([5.0, 1.0, 0.0]).to(dtype)
    if dtype.is_floating_point:
        new[0] = float("nan")
    exact = functools.partial(torch.testing.assert_close, rtol=0, atol=0, equal_nan=True)
    for finite in (torch.tensor(True), torch.tensor(False)):
        mask = bit_mask(finite)
        exact(choose(mask, new, old), torch.where(finite, new, old))
        exact(choose_or_zero(mask, new), torch.where(finite, new, torch.zeros_like(new)))


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
    assert {name for name, _ in optimizer.backends()} == {"compile"}  # and none was given up


def test_a_step_that_the_compiler_refuses_runs_in_eager_stacks_and_says_so_once(monkeypatch, caplog):
    from torch._dynamo.exc import InternalTorchDynamoError

    def refuse(*_):
        raise InternalTorchDynamoError("no support for this")

    monkeypatch.setattr(compile_backend, "find_compile_problem", lambda _: None)
    monkeypatch.setattr(compiled_bucket, "compile_step", lambda *_: refuse)
    compile_backend.tell_refusal.cache_clear()
    with caplog.at_level(logging.WARNING):
        eager, _ = train("eager")
        fallen, optimizer = train("compile")
    assert all(map(torch.equal, eager, fallen))
    assert caplog.text.count("no support for this") == 1
    assert {name for name, _ in optimizer.backends()} == {"eager"}
    assert "InternalTorchDynamoError" in optimizer.describe()


def test_other_errors_of_a_compiled_step_are_raised(monkeypatch):
    def run_out(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(compile_backend, "find_compile_problem", lambda _: None)
    monkeypatch.setattr(compiled_bucket, "compile_step", lambda *_: run_out)
    with pytest.raises(torch.OutOfMemoryError):
        train("compile")


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
