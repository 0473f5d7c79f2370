"""What nobody should hand over: damaged states, options of another kind, gradients and shapes out of this world."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from hf_automagic import Automagic
from hf_automagic.kernels.support import LARGEST_GRADIENT

SHAPES = [(64, 80), (80, 64), (7,)]
DTYPES = [torch.float32, torch.bfloat16]


def params_of(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter((torch.randn(shape, generator=generator) * 0.1).to(dtype)) for shape in SHAPES]


def fill(params: list[nn.Parameter], seed: int) -> None:
    for i, p in enumerate(params):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(1000 * seed + i)).to(p.dtype)


def started(dtype: torch.dtype = torch.float32, **options: Any) -> tuple[list[nn.Parameter], Automagic]:
    params = params_of(dtype)
    optimizer = Automagic(params, **options)
    for step in range(2):
        fill(params, step)
        optimizer.step()
    return params, optimizer


# states that no save of ours holds


def spoil(file: dict[str, Any], name: str, change: Callable[[torch.Tensor], Any]) -> None:
    file["state"][0][name] = change(file["state"][0][name])


def nan_in_one_place(value: torch.Tensor) -> torch.Tensor:
    value.view(-1)[0] = math.nan
    return value


def set_in_group(file: dict[str, Any], name: str, value: Any) -> None:
    file["param_groups"][0][name] = value


DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "NaN in a scale": (lambda f: spoil(f, "exp_avg_scale", nan_in_one_place), "exp_avg_scale of .* file is damaged"),
    "NaN in a vector": (lambda f: spoil(f, "exp_avg_sq_row", nan_in_one_place), "exp_avg_sq_row of .* is damaged"),
    "a negative count": (lambda f: spoil(f, "step", lambda t: t - 9), "the saved step of .* negative count"),
    "a word": (lambda f: spoil(f, "step", lambda t: "two"), "the saved step of .* is 'two' and no tensor"),
    "no states": (lambda f: f["state"].clear(), "has counted 2 steps and holds no states"),
    "no counters": (lambda f: f["param_groups"][0].pop("counters"), "lacks the counters applied"),
    "half the counters": (lambda f: f["param_groups"][0]["counters"].pop("skipped"), "lacks the counters applied"),
    "counters in words": (lambda f: set_in_group(f, "counters", {"applied": 1}), "lacks the counters applied"),
    "a schema in words": (lambda f: set_in_group(f, "schema", "1"), "not written by hf_automagic"),
    "a schema of 0": (lambda f: set_in_group(f, "schema", 0), "not written by hf_automagic"),
    "no groups": (lambda f: f.pop("param_groups"), "has 'state' and 'param_groups', this is a dictionary of"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.matrix("T15")
def test_a_damaged_state_is_refused_and_the_optimizer_goes_on_as_it_was(damage: str):
    """Also where it has stepped already: nothing of the file has been loaded."""
    change, sentence = DAMAGE[damage]
    params, optimizer = started()
    twins, twin = started()
    file = copy.deepcopy(started()[1].state_dict())
    change(file)
    with pytest.raises(ValueError, match=sentence):
        optimizer.load_state_dict(file)
    for owned, its in ((params, optimizer), (twins, twin)):
        fill(owned, 2)
        its.step()
    assert all(torch.equal(a, b) for a, b in zip(params, twins, strict=True))


@pytest.mark.parametrize("given", [None, [], "optimizer.pt"])
def test_what_is_no_state_dict_is_refused_by_what_it_is(given: Any):
    with pytest.raises(ValueError, match=f"this is {type(given).__name__}"):
        started()[1].load_state_dict(given)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32], ids=str)
def test_states_that_were_cast_are_refused_with_the_dtype(dtype: torch.dtype):
    file = started()[1].state_dict()
    spoil(file, "exp_avg_scale", lambda t: t.to(dtype))
    params = params_of()
    optimizer = Automagic(params)
    optimizer.load_state_dict(file)
    fill(params, 2)
    with pytest.raises(ValueError, match=rf"exp_avg_scale \[64, 1\] of {dtype}"):
        optimizer.step()


def test_whole_numbers_are_no_momentum():
    file = started(quantize_states=False)[1].state_dict()
    spoil(file, "exp_avg", lambda t: t.to(torch.int64))
    params = params_of()
    optimizer = Automagic(params, quantize_states=False)
    optimizer.load_state_dict(file)
    fill(params, 2)
    with pytest.raises(ValueError, match=r"exp_avg \[64, 80\] of torch.int64"):
        optimizer.step()


def test_a_file_without_starting_rate_and_role_keeps_those_of_the_optimizer():
    file = started()[1].state_dict()
    for name in ("initial_lr", "role", "is_full_weight"):
        del file["param_groups"][0][name]
    params = params_of()
    optimizer = Automagic(params, lr=2e-4)
    optimizer.load_state_dict(file)
    fill(params, 2)
    optimizer.step()
    assert optimizer.param_groups[0]["initial_lr"] == 2e-4


# options of another kind


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"quantize_states": "false"}, TypeError, "quantize_states must be True or False, got 'false'"),
        ({"cautious": None}, TypeError, "cautious must be True or False, got None"),
        ({"self_tuning": 0}, TypeError, "self_tuning must be True or False, got 0"),
        ({"lr": math.inf}, ValueError, "lr must be finite, got inf"),
        ({"lr": torch.tensor(math.inf)}, ValueError, "lr must be finite"),
        ({"max_lr": math.inf}, ValueError, "max_lr must be finite"),
        ({"max_lr": math.nan}, ValueError, "max_lr must be between 0 and inf, got nan"),
        ({"max_lr": None}, TypeError, "max_lr must be a number, got None"),
        ({"weight_decay": None}, TypeError, "weight_decay must be a number, got None"),
        ({"weight_decay": math.inf}, ValueError, "weight_decay must be finite"),
        ({"warmup_steps": math.inf}, ValueError, "warmup_steps must be finite"),
        ({"sync_frequency": 2.5}, ValueError, "sync_frequency must be a whole number, got 2.5"),
        ({"seed": 1.5}, ValueError, "seed must be a whole number"),
        ({"seed": None}, TypeError, "seed must be a number, got None"),
        ({"betas": 0.9}, TypeError, "betas must be a tuple of numbers, got 0.9"),
        ({"momentum_scales": "1:5"}, TypeError, "momentum_scales must be a tuple of numbers, got '1:5'"),
        ({"codec": None}, TypeError, "codec must be a name, got None"),
        ({"foreach": True}, TypeError, "there is no option 'foreach'"),
        ({"fused": True}, TypeError, "there is no option 'fused'"),
        ({"capturable": True}, TypeError, "there is no option 'capturable'"),
    ],
    ids=str,
)
def test_an_option_of_another_kind_is_refused_at_the_door(options: dict[str, Any], error: type, sentence: str):
    with pytest.raises(error, match=sentence):
        Automagic(params_of(), **options)


@pytest.mark.parametrize("options", [{"max_lr": math.inf}, {"weight_decay": None}, {"cautious": "no"}], ids=str)
def test_so_is_a_groups(options: dict[str, Any]):
    with pytest.raises((TypeError, ValueError), match=next(iter(options))):
        Automagic([{"params": params_of(), **options}])


@pytest.mark.parametrize(
    "options", [{"clip_threshold": math.inf}, {"max_grad_norm": math.inf}, {"min_8bit_size": 1e9}]
)
def test_infinity_is_allowed_where_it_means_never(options: dict[str, float]):
    params, _ = started(**options)
    assert all(p.isfinite().all() for p in params)


def test_parameters_in_a_set_are_refused():
    with pytest.raises(TypeError, match="came as a set, whose order changes between runs"):
        Automagic(set(params_of()))


@pytest.mark.parametrize("lr", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("self_tuning", [True, False])
def test_a_scheduler_that_goes_wild_is_stopped_before_the_weights(lr: float, self_tuning: bool):
    params, optimizer = started(self_tuning=self_tuning)
    before = [p.detach().clone() for p in params]
    optimizer.param_groups[0]["lr"] = lr
    with pytest.raises(ValueError, match=r"a param group's lr has become (nan|-?inf); nothing was stepped"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["initial_lr"]
    optimizer.step()
    assert all(p.isfinite().all() for p in params)


# gradients and shapes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("big", [1.01 * LARGEST_GRADIENT, 1e19, 1e25, 3e38])
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}, {"context": True, "cautious": True}], ids=str)
@pytest.mark.matrix("T7")
def test_a_gradient_whose_square_would_overflow_counts_as_not_finite(
    dtype: torch.dtype, big: float, options: dict[str, Any]
):
    """Its square is infinite in float32, and an average that took it in would stay so for good."""
    params, optimizer = started(dtype, **options)
    before = [p.detach().clone() for p in params]
    fill(params, 2)
    for p in params:
        p.grad.view(-1)[0] = -big
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))
    counters = optimizer.param_groups[0]["counters"]
    assert (int(counters["skipped"]), int(counters["offender"])) == (1, 0)
    fill(params, 3)
    optimizer.step()
    for p, old in zip(params, before, strict=True):
        assert p.isfinite().all()
        assert not torch.equal(p, old)


@pytest.mark.matrix("T7")
def test_the_largest_gradient_that_counts_is_stepped_and_forgotten():
    params, optimizer = started()
    fill(params, 2)
    params[0].grad.fill_(0.99 * LARGEST_GRADIENT)
    optimizer.step()
    assert int(optimizer.param_groups[0]["counters"]["skipped"]) == 0
    for seed in range(3, 6):
        fill(params, seed)
        optimizer.step()
    assert all(p.isfinite().all() for p in params)
    assert all(t.isfinite().all() for s in optimizer.state.values() for t in s.values() if t.is_floating_point())


@pytest.mark.parametrize("index", [0, 2])
@pytest.mark.parametrize("rows", [3, 200])
def test_a_parameter_that_was_resized_is_refused_and_not_stepped_in_part(index: int, rows: int):
    """As where a vocabulary grows inside the same Parameter."""
    params, optimizer = started()
    p = params[index]
    p.grad = None
    p.data = torch.zeros(rows, *p.shape[1:])
    fill(params, 2)
    before = [q.detach().clone() for q in params]
    with pytest.raises(ValueError, match=rf"parameter of shape \({rows},.*take its entry out of optimizer.state"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))
    del optimizer.state[p]
    optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(params, before, strict=True))
    assert int(optimizer.state[p]["step"]) == 1
