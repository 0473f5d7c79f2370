"""Memory that runs out in the middle of a step: whoever calls step() again gets the step, whole and once."""

import copy
import gc
import logging
import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_automagic import Automagic
from hf_automagic.optim import bucket

LORA = {"A": (8, 96), "B": (64, 8)}
PAIRS: dict[str, Any] = {"allora": True, "lora_rank_penalty": True, "rank_penalty_every": 1, "min_8bit_size": 0}
EVERYTHING = {
    **PAIRS,
    "context": True,
    "cautious": True,
    "lr_granularity": "element",
    "momentum_scales": (1, 5),
    "error_correction": True,
    "max_grad_norm": 1.0,
    "weight_decay": 0.1,
}
ADAPTING = {"adaptive_block_size": True, "sync_frequency": 1, "min_8bit_size": 0, "block_error_target": 0.006}


class OutOfMemoryAt(TorchDispatchMode):
    """Refuses the n-th allocation of a step; views and in-place writes take no memory."""

    def __init__(self, number: int | None = None) -> None:
        super().__init__()
        self.number, self.count = number, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(out.alias_info is None for out in func._schema.returns):
            self.count += 1
            if self.count == self.number:
                raise torch.OutOfMemoryError(f"at {func}")
        return func(*args, **(kwargs or {}))


def started(dtype: torch.dtype = torch.float32, **options: Any) -> tuple[list[torch.nn.Parameter], Automagic]:
    generator = torch.Generator().manual_seed(0)
    params, groups = [], []
    for role, (factor, shape) in zip(("lora_A", "lora_B"), LORA.items(), strict=True):
        some = [torch.nn.Parameter((torch.randn(shape, generator=generator) * 0.1).to(dtype)) for _ in range(2)]
        pairs = {"pairs": [0, 1], "scalings": [2.0, 2.0]} if options.get("allora") else {}
        groups.append({"params": some, "role": role, "names": [f"{factor}.{i}" for i in range(2)], **pairs})
        params += some
    optimizer = Automagic(groups, lr=1e-3, **options)
    for seed in range(2):
        fill(params, seed)
        optimizer.step(loss=torch.tensor(1.0))
    return params, optimizer


def fill(params: list[torch.nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def facts(params: list[torch.nn.Parameter], optimizer: Automagic) -> dict[str, Any]:
    """Everything that a step changes."""
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.state_dict()["param_groups"]]
    return {"weights": [p.detach().clone() for p in params], **optimizer.state_dict(), "param_groups": groups}


def assert_equal(left: Any, right: Any, path: str = "") -> None:
    assert type(left) is type(right), path
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype, path
        assert torch.equal(left.nan_to_num(7), right.nan_to_num(7)), path
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), path
        for key in left:
            assert_equal(left[key], right[key], f"{path}.{key}")
    elif isinstance(left, list):
        for i, (a, b) in enumerate(zip(left, right, strict=True)):
            assert_equal(a, b, f"{path}.{i}")
    else:
        assert left == right, path


def allocations(params: list[torch.nn.Parameter], optimizer: Automagic) -> int:
    with OutOfMemoryAt() as counted:
        optimizer.step(loss=torch.tensor(2.0))
    return counted.count


def check_allocations(samples: int | None, dtype: torch.dtype, **options: Any) -> int:
    """Refuses allocations of a step, all or some spread evenly, retries and takes one more step; returns how many."""
    params, optimizer = started(dtype, **options)
    fill(params, 2)
    ready = copy.deepcopy((params, optimizer, [p.grad for p in params]))
    total = allocations(params, optimizer)
    after_one = facts(params, optimizer)
    fill(params, 3)
    optimizer.step(loss=torch.tensor(0.5))
    after_two = facts(params, optimizer)
    assert total > 50
    numbers = range(1, total + 1, 1 if samples is None else total // samples)
    for number in numbers:
        params, optimizer, grads = copy.deepcopy(ready)
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        loss = torch.tensor(2.0)
        with pytest.raises(torch.OutOfMemoryError), OutOfMemoryAt(number):
            optimizer.step(loss=loss)
        optimizer.step(loss=loss)
        assert_equal(facts(params, optimizer), after_one, f"refused allocation {number}")
        fill(params, 3)
        optimizer.step(loss=torch.tensor(0.5))
        assert_equal(facts(params, optimizer), after_two, f"refused allocation {number}, a step later")
    return len(numbers)


CASES = {
    "default": (torch.float32, {"min_8bit_size": 0}),
    "bf16": (torch.bfloat16, {"min_8bit_size": 0}),
    "everything": (torch.bfloat16, EVERYTHING),
    "adapting blocks": (torch.float32, ADAPTING),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.matrix("T16")
def test_a_retried_step_is_the_step_that_was_interrupted(name: str):
    dtype, options = CASES[name]
    check_allocations(8, dtype, **options)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@pytest.mark.matrix("T16")
def test_wherever_memory_runs_out_a_retried_step_is_the_step(name: str):
    dtype, options = CASES[name]
    assert check_allocations(None, dtype, **options) > 50


def test_a_matrix_swept_in_row_slices_goes_on_at_the_row_where_it_broke(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(bucket.CHUNK_BYTES, "cpu", 1024)
    check_allocations(10, torch.bfloat16, min_8bit_size=0, vector_precision="log16")


@pytest.mark.matrix("T16")
def test_the_first_step_may_run_out_of_memory_too():
    params, _ = started()
    others = copy.deepcopy(params)
    fill(params, 5)
    fill(others, 5)
    plain = Automagic(params, min_8bit_size=0)
    total = allocations(params, plain)
    start = copy.deepcopy(others)
    for number in range(1, total, total // 6):
        others = copy.deepcopy(start)
        fill(others, 5)
        hit = Automagic(others, min_8bit_size=0)
        with pytest.raises(torch.OutOfMemoryError), OutOfMemoryAt(number):
            hit.step()
        hit.step()
        assert_equal(facts(others, hit), facts(params, plain))


def test_a_conversion_that_runs_out_of_memory_loses_no_state():
    params, optimizer = started(min_8bit_size=0)
    twins = copy.deepcopy(params)
    twin = Automagic(twins, lr=1e-3, codec="affine", min_8bit_size=0)
    fill(params, 4)
    for number in range(1, 60, 14):
        reader = Automagic(copy.deepcopy(params), lr=1e-3, codec="affine", min_8bit_size=0)
        reader.param_groups[:] = []
        for group in optimizer.param_groups:
            reader.add_param_group({"params": copy.deepcopy(group["params"]), "role": group["role"]})
        reader.load_state_dict(optimizer.state_dict())
        owners = [p for group in reader.param_groups for p in group["params"]]
        fill(owners, 4)
        with pytest.raises(torch.OutOfMemoryError), OutOfMemoryAt(number):
            reader.step()
        reader.step()
        if number == 1:
            twins, twin = owners, reader
        assert_equal(facts(owners, reader), facts(twins, twin))


@pytest.mark.matrix("T16")
def test_with_other_gradients_the_interrupted_step_is_given_up_and_said(caplog: pytest.LogCaptureFixture):
    params, optimizer = started(min_8bit_size=0)
    fill(params, 2)
    with pytest.raises(torch.OutOfMemoryError), OutOfMemoryAt(allocations(*copy_of(params, optimizer)) * 2 // 3):
        optimizer.step()
    fill(params, 3)
    with caplog.at_level(logging.WARNING, "hf_automagic"):
        optimizer.step()
        fill(params, 4)
        optimizer.step()
    said = [r.getMessage() for r in caplog.records]
    assert len(said) == 1
    assert "a step was interrupted, and its gradients or options are gone: 1 of the 2 stacks" in said[0]
    assert [int(optimizer.state[p]["step"]) for p in params] == [5, 5, 4, 4]
    assert int(optimizer.param_groups[0]["counters"]["applied"]) == 4
    assert all(bool(p.isfinite().all()) for p in params)


def copy_of(params: list[torch.nn.Parameter], optimizer: Automagic) -> tuple[list[torch.nn.Parameter], Automagic]:
    others, other = copy.deepcopy((params, optimizer))
    for p, q in zip(others, params, strict=True):
        p.grad = None if q.grad is None else q.grad.clone()
    return others, other


def test_a_gradient_changed_in_place_is_another_gradient(caplog: pytest.LogCaptureFixture):
    params, optimizer = started(min_8bit_size=0)
    fill(params, 2)
    with pytest.raises(torch.OutOfMemoryError), OutOfMemoryAt(100):
        optimizer.step()
    params[0].grad.mul_(0.5)
    with caplog.at_level(logging.WARNING, "hf_automagic"):
        optimizer.step()
    assert "a step was interrupted" in caplog.text


def test_an_interrupted_step_keeps_no_gradient_alive():
    params, optimizer = started()
    fill(params, 2)
    with pytest.raises(torch.OutOfMemoryError), OutOfMemoryAt(80):
        optimizer.step()
    watched = [weakref.ref(p.grad) for p in params]
    for p in params:
        p.grad = None
    gc.collect()
    assert [grad() for grad in watched] == [None] * len(params)


def test_a_loaded_state_forgets_the_interruption(caplog: pytest.LogCaptureFixture):
    params, optimizer = started()
    before = facts(params, optimizer)
    file = optimizer.state_dict()
    fill(params, 2)
    with pytest.raises(torch.OutOfMemoryError), OutOfMemoryAt(150):
        optimizer.step()
    optimizer.load_state_dict(file)
    for p, saved in zip(params, before["weights"], strict=True):
        p.data.copy_(saved)
    others, other = started()
    fill(others, 2)
    with caplog.at_level(logging.WARNING, "hf_automagic"):
        optimizer.step()
        other.step()
    assert_equal(facts(params, optimizer), facts(others, other))
    assert caplog.text == ""
