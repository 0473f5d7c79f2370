"""A fused step that breaks between two launches goes on with the next one, or is given up and said."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.test_triton import CASES, Case, build, parameters, runs_kernels, take


class Interrupted(Exception):
    """Stands for Ctrl-C, or for memory that ran out."""


def interrupt_at(monkeypatch: pytest.MonkeyPatch, number: int) -> Callable[[], None]:
    """Lets the launch of this number fail, once; what is returned lets all pass again."""
    from hf_automagic.kernels.launch import Launch

    whole, count = Launch.__call__, itertools.count()

    def launch(self: Any, stream: int) -> None:
        if next(count) == number:
            raise Interrupted
        whole(self, stream)

    monkeypatch.setattr(Launch, "__call__", launch)
    return monkeypatch.undo


@runs_kernels
@pytest.mark.parametrize("number", [0, 2, 4, 5, 6, 7, 8])
def test_an_interrupted_step_goes_on_with_the_launch_that_was_next(monkeypatch, number):
    case, dtype, shapes = CASES[0], torch.float32, [(16, 64), (17,)]
    twins = [build(parameters(dtype, shapes), case, "triton") for _ in range(2)]
    take(twins, case, range(1), dtype)
    undo = interrupt_at(monkeypatch, number)
    with pytest.raises(Interrupted):
        take(twins[:1], case, range(1, 2), dtype)
    undo()
    twins[0].step()
    take(twins[1:], case, range(1, 2), dtype)
    take(twins, case, range(2, 3), dtype)
    for group, other in zip(*(o.param_groups for o in twins), strict=True):
        assert torch.equal(group["update_rms"], other["update_rms"])
        for p, q in zip(group["params"], other["params"], strict=True):
            assert torch.equal(p, q)
            assert all(torch.equal(v, twins[1].state[q][name]) for name, v in twins[0].state[p].items())
    assert int(twins[0].param_groups[0]["counters"]["applied"]) == 3


@runs_kernels
@pytest.mark.parametrize("says", ["a TritonError", "PassManager::run failed"])
def test_kernels_that_do_not_compile_leave_the_step_to_eager_stacks(monkeypatch, caplog, says):
    from triton.errors import TritonError

    from hf_automagic.kernels.launch import Launch
    from hf_automagic.optim import fused

    def prepare(self: Any, scratch: torch.Tensor) -> None:
        raise TritonError(says) if says == "a TritonError" else RuntimeError(says)

    monkeypatch.setattr(Launch, "prepare", prepare)
    monkeypatch.setattr(fused, "_given_up", [])
    case, dtype, shapes = CASES[0], torch.float32, [(16, 64), (17,)]
    broken, eager, late = [build(parameters(dtype, shapes), case, name) for name in ("triton", "eager", "triton")]
    take([broken, eager, late], case, range(3), dtype)
    for optimizer in (broken, late):
        assert {name for name, _ in optimizer.backends()} == {"eager"}
        for group, other in zip(optimizer.param_groups, eager.param_groups, strict=True):
            assert all(map(torch.equal, group["params"], other["params"]))
            assert torch.equal(group["update_rms"], other["update_rms"])
    assert caplog.text.count("triton cannot compile the kernels here") == 1
    assert says in caplog.text


@runs_kernels
def test_other_errors_before_a_step_are_raised(monkeypatch):
    from hf_automagic.kernels.launch import Launch

    def prepare(self: Any, scratch: torch.Tensor) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(Launch, "prepare", prepare)
    optimizer = build(parameters(torch.float32, [(16, 64)]), CASES[0], "triton")
    with pytest.raises(torch.OutOfMemoryError):
        take([optimizer], CASES[0], range(1), torch.float32)
    monkeypatch.undo()
    optimizer.step()
    assert int(optimizer.param_groups[0]["counters"]["applied"]) == 1


@runs_kernels
@pytest.mark.parametrize("broken", ["_on_host", "_copy_odd"])
def test_gradients_whose_upload_broke_are_uploaded_again(monkeypatch, broken):
    from hf_automagic.kernels.triton_backend import TritonStep

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError

    case, dtype, shapes = CASES[1], torch.float32, [(16, 64), (17,)]
    twins = [build(parameters(dtype, shapes), case, "triton") for _ in range(2)]
    take(twins, case, range(1), dtype)
    twin_params = [[p for group in o.param_groups for p in group["params"]] for o in twins]
    for params in twin_params:
        for p in params:
            assert p.grad is not None
            moved = torch.cat([p.grad.new_zeros(4), -3 * p.grad.flatten()])  # on 16 bytes again, or not
            p.grad = moved[4:].view(p.shape) if broken == "_on_host" else moved[1:-3].view(p.shape)
    with monkeypatch.context() as patch:
        patch.setattr(TritonStep, broken, fail)
        with pytest.raises(torch.OutOfMemoryError):
            twins[0].step()
    for _ in range(2):
        for optimizer in twins:
            optimizer.step()
    assert all(map(torch.equal, *twin_params))


@runs_kernels
def test_parameters_without_elements_alone_take_a_step():
    optimizer = build(parameters(torch.float32, [(0, 4), (0,)]), Case("", {}), "triton")
    take([optimizer], Case("", {}), range(2), torch.float32)
    assert int(optimizer.param_groups[0]["counters"]["applied"]) == 2


@runs_kernels
def test_a_look_that_was_interrupted_leaves_no_offender_to_other_gradients(monkeypatch, caplog):
    case, dtype, shapes = Case("", {}, broken=(0,)), torch.float32, [(16, 64), (17,), (16, 64)]
    optimizer = build(parameters(dtype, shapes), case, "triton")
    undo = interrupt_at(monkeypatch, 2)  # the look has found the broken gradient, and not told yet
    with pytest.raises(Interrupted):
        take([optimizer], case, range(1), dtype)
    undo()
    take([optimizer], case, range(1, 2), dtype)
    assert {k: int(v) for k, v in optimizer.param_groups[0]["counters"].items()} == {
        "applied": 1, "skipped": 0, "consecutive": 0, "offender": -1,
    }  # fmt: skip
    assert "interrupted" in caplog.text
