"""Odd gradients, odd parameters and what else happens around a step: it steps right, or says why not in a sentence."""

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_automagic import Automagic

EVERYTHING: dict[str, Any] = {
    "cautious": True,
    "context": True,
    "error_correction": True,
    "lr_granularity": "element",
    "momentum_scales": (1, 5),
    "min_8bit_size": 0,
    "weight_decay": 0.1,
}
CONFIGS = [{}, EVERYTHING]
SHAPES = [(8, 64), (7, 33), (17,), (), (2, 3, 4, 4)]


def make(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter((torch.randn(s, generator=generator) * 0.1).to(dtype)) for s in shapes or SHAPES]


def fill(params: Any, seed: int) -> None:
    for i, p in enumerate(params):
        generator = torch.Generator().manual_seed(1000 * seed + i)
        p.grad = torch.randn(p.shape, generator=generator).to(device=p.device, dtype=p.dtype)


def run(params: Any, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for seed in steps:
        fill(params, seed)
        optimizer.step()


def everything(params: Any, optimizer: Automagic, but: tuple[str, ...] = ()) -> list[Tensor]:
    """Copies of all weights, states and shared tensors."""
    groups = optimizer.state_dict()["param_groups"]
    shared = [
        tensor
        for group in groups
        for key, value in sorted(group.items())
        if key not in but
        for tensor in (value.values() if isinstance(value, dict) else [value])
        if isinstance(tensor, Tensor)
    ]
    states = [t for p in params for _, t in sorted(optimizer.state[p].items())]
    return [t.detach().clone() for t in (*params, *states, *shared)]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(
        a.dtype == b.dtype and torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(left, right, strict=True)
    )


# gradients that are not finite


def one_element(params: list[nn.Parameter], bad: float) -> None:
    params[1].grad[3, 4] = bad


def one_tensor(params: list[nn.Parameter], bad: float) -> None:
    params[3].grad.fill_(bad)


def all_tensors(params: list[nn.Parameter], bad: float) -> None:
    for p in params:
        p.grad.fill_(bad)


# set anew before each step, or counted, whatever its gradients
COUNTED = ("counters", "events", "context_state", "effective_lr", "base_lr", "update_rms")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("spoil", [one_element, one_tensor, all_tensors], ids=lambda f: f.__name__)
@pytest.mark.parametrize("config", CONFIGS, ids=["default", "everything"])
@pytest.mark.matrix("T7")
def test_a_gradient_that_is_not_finite_leaves_weights_and_states_alone(config, spoil, bad, dtype):
    params = make(dtype=dtype)
    optimizer = Automagic(params, **config)
    run(params, optimizer, range(2))
    before = everything(params, optimizer, but=COUNTED)
    fill(params, 2)
    spoil(params, bad)
    optimizer.step()
    assert same(everything(params, optimizer, but=COUNTED), before)
    counters = {name: int(value) for name, value in optimizer.param_groups[0]["counters"].items()}
    offender = {one_element: 1, one_tensor: 3, all_tensors: 0}[spoil]
    assert counters == {"applied": 2, "skipped": 1, "consecutive": 1, "offender": offender}


# parameters and gradients of other kinds


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.matrix("T8")
def test_a_kind_that_cannot_be_stepped_is_refused_by_name(dtype):
    model = nn.ParameterDict({"odd": nn.Parameter(torch.zeros(4, 4).to(dtype))})
    with pytest.raises(TypeError, match=r"odd is .*, and Automagic steps float32.*cast it, or freeze it"):
        Automagic(model.named_parameters())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn], ids=str)
@pytest.mark.matrix("T8")
def test_a_frozen_parameter_of_any_kind_is_no_trouble(dtype):
    frozen = nn.Parameter(torch.ones(4, 4).to(dtype), requires_grad=False)
    params = make((8, 8))
    optimizer = Automagic([frozen, *params])
    run(params, optimizer, range(2))
    assert set(optimizer.state) == set(params)
    assert torch.equal(frozen.view(torch.uint8), torch.ones(4, 4).to(dtype).view(torch.uint8))


@pytest.mark.matrix("T8")
def test_what_is_unfrozen_is_checked_then():
    frozen = nn.Parameter(torch.ones(4, 4).to(torch.float8_e4m3fn), requires_grad=False)
    params = make((8, 8))
    optimizer = Automagic([frozen, *params])
    run(params, optimizer, range(1))
    frozen.requires_grad_(True)
    fill(params, 1)
    with pytest.raises(TypeError, match="float8_e4m3fn"):
        optimizer.step()


@pytest.mark.matrix("T8")
def test_fp64_is_stepped_in_fp64():
    params = make(dtype=torch.float64)
    optimizer = Automagic(params, lr=1e-12, self_tuning=False)
    before = [p.detach().clone() for p in params]
    run(params, optimizer, range(2))
    for p, old in zip(params, before, strict=True):
        assert 0 < float((p.detach() - old).abs().max()) < 1e-11


@pytest.mark.parametrize("config", CONFIGS, ids=["default", "everything"])
@pytest.mark.matrix("T8")
def test_a_sparse_gradient_is_refused_by_name_and_nothing_has_moved(config):
    model = nn.ModuleDict({"linear": nn.Linear(4, 4), "words": nn.Embedding(8, 4, sparse=True)})
    optimizer = Automagic(model.named_parameters(), **config)
    before = [p.detach().clone() for p in model.parameters()]
    model["linear"](model["words"](torch.tensor([1, 2]))).sum().backward()
    with pytest.raises(TypeError, match=r"words.weight has a sparse gradient.*sparse=False"):
        optimizer.step()
    assert same([p.detach() for p in model.parameters()], before)
    model["words"].weight.grad = model["words"].weight.grad.to_dense()
    optimizer.step()
    assert not same([p.detach() for p in model.parameters()], before)


@pytest.mark.matrix("T9")
def test_an_expanded_parameter_is_refused():
    with pytest.raises(ValueError, match=r"is expanded, shape \(3, 4\) with strides \(0, 1\).*clone"):
        Automagic([nn.Parameter(torch.ones(4).expand(3, 4))])


def test_a_parameter_listed_twice_is_refused():
    (param,) = make((4, 4))
    with pytest.warns(UserWarning, match="duplicate"), pytest.raises(ValueError, match="are one parameter"):
        Automagic([param, param])


@pytest.mark.matrix("T9")
def test_an_expanded_gradient_is_a_gradient():
    params, others = make((4, 6)), make((4, 6))
    for owned in (params, others):
        optimizer = Automagic(owned)
        row = torch.randn(6, generator=torch.Generator().manual_seed(0)).expand(4, 6)
        owned[0].grad = row if owned is params else row.clone()
        optimizer.step()
    assert torch.equal(params[0], others[0])


def transposed(p: Tensor) -> Tensor:
    return p.t().contiguous().t()


def every_second(p: Tensor) -> Tensor:
    wide = torch.zeros(*p.shape[:-1], 2 * p.shape[-1])
    wide[..., ::2] = p
    return wide[..., ::2]


def shifted(p: Tensor) -> Tensor:
    return torch.cat([torch.zeros(1), p.flatten()])[1:].view(p.shape)


@pytest.mark.parametrize("config", CONFIGS, ids=["default", "everything"])
@pytest.mark.parametrize("layout", [transposed, every_second, shifted], ids=lambda f: f.__name__)
@pytest.mark.matrix("T9")
def test_the_layout_in_memory_changes_no_bit(config, layout):
    plain = make((16, 24))
    odd = [nn.Parameter(layout(p.detach())) for p in plain]
    assert odd[0].stride() != plain[0].stride() or odd[0].storage_offset()
    for params in (plain, odd):
        run(params, Automagic(params, **config), range(4))
    assert torch.equal(plain[0], odd[0])


@pytest.mark.parametrize("config", CONFIGS, ids=["default", "everything"])
@pytest.mark.matrix("T9")
def test_channels_last_changes_no_bit(config):
    plain = make((8, 4, 3, 3))
    odd = [nn.Parameter(plain[0].detach().clone(memory_format=torch.channels_last))]
    for params in (plain, odd):
        run(params, Automagic(params, **config), range(4))
    assert odd[0].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(plain[0], odd[0])


class Tied(nn.Module):
    """An embedding and a head of one weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(12, 8)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.words.weight


@pytest.mark.matrix("T9")
def test_tied_weights_are_stepped_once():
    model = Tied()
    optimizer = Automagic(model.named_parameters(), lr=1e-4, self_tuning=False)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 1
    before = model.head.weight.detach().clone()
    model.head(model.words(torch.arange(12))).square().sum().backward()
    optimizer.step()
    assert model.head.weight is model.words.weight
    assert int(optimizer.state[model.head.weight]["step"]) == 1
    assert float((model.head.weight.detach() - before).square().mean().sqrt()) < 1.2e-4


# groups and parameters that come and go


@pytest.mark.matrix("T5")
def test_empty_groups_of_any_place_change_nothing():
    params, others = make((8, 64), (16,)), make((8, 64), (16,))
    plain = Automagic(params)
    odd = Automagic([{"params": []}, {"params": others}, {"params": [], "role": "lora_B"}])
    run(params, plain, range(3))
    run(others, odd, range(3))
    assert same([*params], [*others])
    assert len(odd.get_learning_rates()) == 3
    assert "trainable" in odd.describe()
    odd.load_state_dict(copy.deepcopy(odd.state_dict()))
    run(others, odd, range(3, 4))


@pytest.mark.matrix("T5")
def test_an_optimizer_of_frozen_parameters_steps_and_saves():
    params = make((4, 4))
    params[0].requires_grad_(False)
    optimizer = Automagic(params)
    optimizer.step()
    assert not optimizer.state_dict()["state"]


@pytest.mark.parametrize("config", CONFIGS, ids=["default", "everything"])
@pytest.mark.matrix("T5")
def test_a_parameter_unfrozen_later_steps_from_then_on(config):
    params = make((8, 64), (8, 64))
    params[1].requires_grad_(False)
    optimizer = Automagic(params, **config)
    start = params[1].detach().clone()
    run(params[:1], optimizer, range(3))
    assert torch.equal(params[1].detach(), start)
    params[1].requires_grad_(True)
    run(params, optimizer, range(3, 5))
    assert not torch.equal(params[1].detach(), start)
    assert [int(optimizer.state[p]["step"]) for p in params] == [5, 2]
    params[0].requires_grad_(False)
    params[0].grad = None
    kept = params[0].detach().clone()
    run(params[1:], optimizer, range(5, 6))
    assert torch.equal(params[0].detach(), kept)
    assert [int(optimizer.state[p]["step"]) for p in params] == [5, 3]


@pytest.mark.parametrize("config", CONFIGS, ids=["default", "everything"])
@pytest.mark.matrix("T5")
def test_a_parameter_that_misses_steps_goes_on_where_it_was(config):
    """What a parameter does depends on its own gradients alone, at a rate that is fixed."""
    fixed = {**config, "self_tuning": False, "context": False, "lr_granularity": "tensor"}
    alone, beside = make((8, 64)), make((8, 64), (8, 64), (7, 33))
    first, second = Automagic(alone, **fixed), Automagic(beside, **fixed)
    for step, comes in enumerate([True, False, True, True, False, True]):
        fill(beside, step)
        if comes:
            alone[0].grad = beside[0].grad.clone()
            first.step()
        else:
            beside[0].grad = None
        second.step()
    assert torch.equal(alone[0], beside[0])


@pytest.mark.matrix("T5")
def test_a_group_added_in_the_middle_survives_a_resume():
    params, late = make((8, 64)), make((16, 8))
    optimizer = Automagic(params, **EVERYTHING)
    run(params, optimizer, range(2))
    optimizer.add_param_group({"params": late, "role": "lora_B", "max_lr": 5e-4})
    run([*params, *late], optimizer, range(2, 4))
    twins, late_twins = copy.deepcopy(params), copy.deepcopy(late)
    twin = Automagic([{"params": twins}, {"params": late_twins, "role": "lora_B"}], **EVERYTHING)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run([*params, *late], optimizer, range(4, 6))
    run([*twins, *late_twins], twin, range(4, 6))
    assert same(everything([*params, *late], optimizer), everything([*twins, *late_twins], twin))


# devices and dtypes that change


@pytest.mark.matrix("T10")
def test_parameters_without_memory_can_be_planned_and_stepped():
    params = [nn.Parameter(torch.empty(s, device="meta")) for s in SHAPES]
    optimizer = Automagic(params, **EVERYTHING)
    planned = optimizer.memory_stats().total_bytes
    for p in params:
        p.grad = torch.empty_like(p)
    optimizer.step()
    assert {t.device.type for state in optimizer.state.values() for t in state.values()} == {"meta"}
    on_cpu = make()
    other = Automagic(on_cpu, **EVERYTHING)
    run(on_cpu, other, range(1))
    assert planned == other.memory_stats().total_bytes == optimizer.memory_stats().total_bytes


@pytest.mark.matrix("T10")
def test_a_model_that_changes_its_dtype_keeps_its_states():
    params = make((8, 64))
    optimizer = Automagic(params)
    run(params, optimizer, range(3))
    momentum = optimizer.state[params[0]]["exp_avg"].clone()
    params[0].data = params[0].data.to(torch.bfloat16)
    fill(params, 3)
    params[0].grad.zero_()
    optimizer.step()
    assert params[0].dtype == torch.bfloat16
    assert int(optimizer.state[params[0]]["step"]) == 4
    torch.testing.assert_close(optimizer.state[params[0]]["exp_avg"], 0.8 * momentum)


@pytest.mark.gpu
@pytest.mark.parametrize("config", CONFIGS, ids=["default", "everything"])
@pytest.mark.matrix("T10")
def test_a_model_that_moves_to_the_gpu_and_back_goes_on(config):
    torch.manual_seed(0)
    model, twin = nn.Linear(64, 16), nn.Linear(64, 16)
    twin.load_state_dict(model.state_dict())
    optimizer, other = Automagic(model.parameters(), **config), Automagic(twin.parameters(), **config)
    for step, device in enumerate(["cpu", "cuda", "cuda", "cpu", "cuda"]):
        model.to(device)
        run(list(model.parameters()), optimizer, range(step, step + 1))
        run(list(twin.parameters()), other, range(step, step + 1))
        assert {t.device.type for s in optimizer.state.values() for t in s.values()} == {device}
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.cpu(), q, rtol=0, atol=2e-5)


@pytest.mark.gpu
@pytest.mark.matrix("T10")
def test_groups_on_two_devices_step_together():
    params = [*make((8, 64)), *(nn.Parameter(p.detach().cuda()) for p in make((8, 64)))]
    optimizer = Automagic(params, context=True, max_grad_norm=1.0)
    run(params, optimizer, range(3))
    params[1].grad.fill_(torch.nan)
    before = [p.detach().clone() for p in params]
    optimizer.step()
    assert same([p.detach() for p in params], before)
    assert int(optimizer.param_groups[0]["counters"]["offender"]) == 1


# copies and hooks


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["copied", "pickled"])
@pytest.mark.parametrize("steps", [0, 3])
def test_a_copy_has_everything_and_shares_nothing(clone, steps):
    params = make()
    optimizer = Automagic(params, **EVERYTHING)
    run(params, optimizer, range(steps))
    twin = clone(optimizer)
    twins = twin.param_groups[0]["params"]
    kept = everything(params, optimizer)
    run(twins, twin, range(steps, steps + 2))
    assert same(everything(params, optimizer), kept)
    run(params, optimizer, range(steps, steps + 2))
    assert same(everything(params, optimizer), everything(twins, twin))


def test_step_hooks_run_around_a_step_once():
    params = make((8, 8))
    optimizer = Automagic(params)
    seen: list[Any] = []
    optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append(("before", params[0].detach().clone())))
    optimizer.register_step_post_hook(lambda o, args, kwargs: seen.append(("after", params[0].detach().clone())))
    run(params, optimizer, range(1))
    assert [name for name, _ in seen] == ["before", "after"]
    assert not torch.equal(seen[0][1], seen[1][1])


@pytest.mark.matrix("T3")
def test_hooks_of_saving_and_loading_see_tensors():
    params = make((8, 64))
    optimizer = Automagic(params, min_8bit_size=0)
    run(params, optimizer, range(2))
    seen: dict[str, Any] = {}

    def look(name: str, state: Any) -> None:
        seen[name] = {key: (type(t), t.dtype) for key, t in next(iter(state.values())).items()}

    optimizer.register_state_dict_post_hook(lambda o, packed: look("saved", packed["state"]))
    saved = optimizer.state_dict()
    reader = Automagic(make((8, 64)), min_8bit_size=0)
    reader.register_load_state_dict_pre_hook(lambda o, packed: look("before the load", packed["state"]))
    reader.register_load_state_dict_post_hook(lambda o: look("after the load", o.state))
    reader.load_state_dict(saved)
    assert seen["saved"] == seen["before the load"] == seen["after the load"]
    assert seen["saved"]["exp_avg_codes"] == (Tensor, torch.int8)


def test_a_hook_may_bring_a_file_of_another_program_into_our_form():
    params = make((8, 64))
    optimizer = Automagic(params)
    run(params, optimizer, range(2))
    ours = optimizer.state_dict()
    theirs = {**ours, "param_groups": [{k: v for k, v in g.items() if k != "schema"} for g in ours["param_groups"]]}
    reader = Automagic(make((8, 64)))
    reader.register_load_state_dict_pre_hook(
        lambda o, packed: {**packed, "param_groups": [{**g, "schema": 1} for g in packed["param_groups"]]}
    )
    reader.load_state_dict(theirs)
    assert int(next(iter(reader.state.values()))["step"]) == 2


def test_a_load_that_fails_leaves_no_hook_behind():
    params = make((8, 64))
    optimizer = Automagic(params)
    run(params, optimizer, range(1))
    good, bad = optimizer.state_dict(), torch.optim.SGD(make((8, 64)), lr=0.1).state_dict()
    for _ in range(2):
        with pytest.raises(ValueError, match="not written by hf_automagic"):
            optimizer.load_state_dict(bad)
        optimizer.load_state_dict(good)
    run(params, optimizer, range(1, 2))


def test_gradients_are_never_changed():
    for config, shape in itertools.product(CONFIGS, SHAPES):
        params = make(shape)
        optimizer = Automagic(params, max_grad_norm=1e-3, **config)
        fill(params, 0)
        before = params[0].grad.clone()
        optimizer.step()
        assert torch.equal(params[0].grad, before)
