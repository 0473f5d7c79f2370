"""Ideas of other projects' suites, in our words: torch's OptimizerInfo, PEFT, torchao's low-bit tests, bitsandbytes.

torch's database of optimizers and their error inputs ships in its wheel as a private module: it drives our class where
it is found.
"""

import copy
import io
import itertools
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from hf_automagic import Automagic, list_optimizers
from hf_automagic.registry import get_optimizer_info

RECIPES = [dict(get_optimizer_info(name).options) for name in list_optimizers()]
IDS = list_optimizers()


def database() -> Any:
    return pytest.importorskip("torch.testing._internal.common_optimizers", exc_type=ImportError)


# torch: every optimizer


def error_inputs() -> list[Any]:
    try:
        from torch.testing._internal.common_optimizers import get_error_inputs_for_all_optims
    except ImportError:
        return []
    return get_error_inputs_for_all_optims("cpu", torch.float32)


@pytest.mark.parametrize("wrong", error_inputs(), ids=lambda wrong: wrong.optimizer_error_input.desc)
@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
@pytest.mark.matrix("T8")
def test_what_every_optimizer_of_torch_refuses_is_refused(wrong):
    given = wrong.optimizer_error_input
    params = [nn.Parameter(torch.ones(1, 1))] if given.params is None else given.params
    if wrong.error_type is UserWarning:  # torch warns that this will be an error; here it is one
        with pytest.raises(ValueError, match="are one parameter"):
            Automagic(params, **given.kwargs)
        return
    with pytest.raises((TypeError, ValueError)) as refusal:
        Automagic(params, **given.kwargs)
    assert len(str(refusal.value)) > 20


def our_info() -> Any:
    module = database()
    inputs = [
        module.OptimizerInput(params=None, kwargs=options, desc=name)
        for name, options in zip(IDS, RECIPES, strict=True)
    ]
    return module.OptimizerInfo(Automagic, optim_inputs_func=lambda device: inputs, supports_complex=False)


SCHEDULERS = [
    None,
    lambda o: lr_scheduler.StepLR(o, gamma=0.9, step_size=10),
    lambda o: lr_scheduler.ReduceLROnPlateau(o),
    lambda o: lr_scheduler.OneCycleLR(o, max_lr=1e-2, total_steps=60, cycle_momentum=False),
    lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.5, 5), lr_scheduler.ExponentialLR(o, 0.99)], milestones=[5]
    ),
]


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("schedule", SCHEDULERS, ids=["none", "step", "plateau", "one cycle", "sequential"])
@pytest.mark.matrix("T25")
def test_every_input_of_the_database_goes_in_the_right_direction(schedule, contiguous):
    for given in our_info().optim_inputs_func(device="cpu"):
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(10, 5) if contiguous else torch.randn(10, 5, 2)[..., 0])
        bias, entry = nn.Parameter(torch.randn(10)), torch.randn(5)
        optimizer = Automagic([weight, bias], lr=1e-2, max_lr=5e-2, **given.kwargs)
        scheduler = schedule(optimizer) if schedule else None

        def closure(weight: Any = weight, bias: Any = bias, entry: Any = entry, optimizer: Any = optimizer) -> Any:
            optimizer.zero_grad()
            loss = (weight.mv(entry) + bias).square().sum()
            loss.backward()
            return loss

        first = float(closure().detach())
        for _ in range(40):
            last = float(optimizer.step(closure).detach())
            if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
                scheduler.step(last)
            elif scheduler:
                scheduler.step()
        assert last < 0.9 * first, given.desc


@pytest.mark.parametrize("options", RECIPES, ids=IDS)
def test_without_gradients_nothing_happens(options):
    params = [nn.Parameter(torch.randn(2, 3)) for _ in range(2)]
    before = copy.deepcopy(params)
    optimizer = Automagic(params, **options)
    for _ in range(3):
        optimizer.step()
    assert all(map(torch.equal, params, before))
    assert not optimizer.state


@pytest.mark.parametrize("options", RECIPES, ids=IDS)
@pytest.mark.matrix("T6")
def test_with_zero_gradients_from_the_first_step_nothing_moves(options):
    params = [nn.Parameter(torch.randn(8, 64)), nn.Parameter(torch.randn(5))]
    before = copy.deepcopy(params)
    optimizer = Automagic(params, min_8bit_size=0, **options)
    for _ in range(5):
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert all(map(torch.equal, params, before))


@pytest.mark.parametrize("options", RECIPES, ids=IDS)
def test_a_rate_may_be_a_tensor(options):
    ends = []
    for rate in (1e-3, torch.tensor(1e-3)):
        torch.manual_seed(0)
        param = nn.Parameter(torch.randn(8, 64))
        optimizer = Automagic([param], lr=rate, **options)
        for _ in range(3):
            param.grad = torch.randn(8, 64)
            optimizer.step()
        ends.append(param.detach())
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-5, atol=1e-8)


# torchao: states in few bits

DTYPES = [torch.float32, torch.bfloat16]


def train(params: list[nn.Parameter], optimizer: Automagic, steps: range) -> None:
    for seed in steps:
        generator = torch.Generator().manual_seed(seed)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype) + 0.2
        optimizer.step()


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    return torch.load(io.BytesIO(file.getvalue()), map_location="cpu", weights_only=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", RECIPES, ids=IDS)
def test_two_more_steps_after_a_file_are_the_same_two_steps(options, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 256), nn.ReLU(), nn.Linear(256, 32)).to(dtype)
    params = list(model.parameters())
    optimizer = Automagic(params, **options)
    train(params, optimizer, range(2))
    twins = copy.deepcopy(params)
    twin = Automagic(twins, **options)
    twin.load_state_dict(through_a_file(optimizer.state_dict()))
    for owned, one in ((params, optimizer), (twins, twin)):
        train(owned, one, range(2, 4))
    assert all(map(torch.equal, params, twins))


@pytest.mark.parametrize("codec", ["softsign", "affine", "dynamic"])
def test_in_few_bits_the_way_is_that_in_fp32(codec):
    """As close as a momentum in 8 bits can be: 2% of the way after 20 steps."""
    ends = []
    for options in ({"quantize_states": False}, {"codec": codec, "min_8bit_size": 0}):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(s) * 0.1) for s in [(64, 128), (256, 32)]]
        start = copy.deepcopy(params)
        train(params, Automagic(params, lr=1e-3, **options), range(20))
        ends.append([p.detach() - s.detach() for p, s in zip(params, start, strict=True)])
    limit = {"softsign": 0.02, "affine": 0.06, "dynamic": 0.06}[codec]
    for exact, stored in zip(*ends, strict=True):
        assert float((exact - stored).norm() / exact.norm()) < limit


def test_groups_of_different_rates_differ_in_nothing_else():
    torch.manual_seed(0)
    params = [nn.Parameter(torch.zeros(16, 64)) for _ in range(2)]
    optimizer = Automagic([{"params": params[:1], "lr": 1e-4}, {"params": params[1:], "lr": 2e-4}], self_tuning=False)
    for _ in range(3):
        params[0].grad = torch.randn(16, 64)
        params[1].grad = params[0].grad.clone()
        optimizer.step()
    torch.testing.assert_close(2 * params[0].detach(), params[1].detach())


# bitsandbytes: long loops of sizes, with a save and a load every few steps

SIZES = list(itertools.product([1, 32, 1024, 4097], [(), (16,)]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("first", "rest"), SIZES, ids=str)
def test_a_loop_of_saves_and_loads_changes_no_byte(first, rest, dtype):
    torch.manual_seed(0)
    params = [nn.Parameter((torch.randn(first, *rest) * 0.1).to(dtype))]
    looped = copy.deepcopy(params)
    plain, one = Automagic(params, min_8bit_size=0), Automagic(looped, min_8bit_size=0)
    for step in range(12):
        train(params, plain, range(step, step + 1))
        train(looped, one, range(step, step + 1))
        if step % 4 == 3:
            packed = through_a_file(one.state_dict())
            one = Automagic(looped, min_8bit_size=0)
            one.load_state_dict(packed)
            for name, tensor in packed["state"][0].items():
                assert torch.equal(one.state[looped[0]][name], tensor)
                assert one.state[looped[0]][name].dtype == tensor.dtype
    assert torch.equal(params[0], looped[0])
    assert all(bool(t.isfinite().all()) for t in plain.state[params[0]].values() if t.is_floating_point())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("first", [1, 32, 1024, 4097])
def test_a_hundred_steps_in_few_bits_stay_near_those_in_fp32(first, dtype):
    ends = []
    for options in ({"quantize_states": False}, {"min_8bit_size": 0}):
        torch.manual_seed(0)
        params = [nn.Parameter((torch.randn(first, 16) * 0.1).to(dtype))]
        start = params[0].detach().double()
        train(params, Automagic(params, lr=1e-3, **options), range(100))
        ends.append(params[0].detach().double() - start)
    spacing = torch.finfo(dtype).eps * 0.3  # of weights around 0.1 to 0.3
    assert float((ends[0] - ends[1]).abs().mean()) < 0.02 * float(ends[0].abs().mean()) + spacing


# PEFT: its factories with our class


@pytest.mark.filterwarnings("ignore:.* is deprecated and will be removed in v6:FutureWarning:transformers")
def test_pefts_lora_plus_factory_takes_our_class():
    peft = pytest.importorskip("peft")
    from peft.optimizers import create_loraplus_optimizer

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(12, 16)
            self.linear = nn.Linear(16, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(self.words(x))

    torch.manual_seed(0)
    for targets, filled in ((["linear"], [1, 0, 1, 0]), (["words", "linear"], [1, 2, 1, 0])):
        model = peft.get_peft_model(Model(), peft.LoraConfig(r=4, target_modules=targets))
        optimizer = create_loraplus_optimizer(
            model, Automagic, lr=5e-5, loraplus_lr_ratio=4.0, loraplus_lr_embedding=1e-6, loraplus_weight_decay=0.1
        )
        assert isinstance(optimizer, Automagic)
        assert [len(group["params"]) for group in optimizer.param_groups] == filled
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([5e-5, 1e-6, 2e-4, 2e-4])
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1, 0.1, 0.0]
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.arange(12)).square().sum().backward()
            optimizer.step()
        for name, p in model.named_parameters():
            assert torch.equal(p, before[name]) != p.requires_grad, name
        optimizer.load_state_dict(through_a_file(optimizer.state_dict()))
        optimizer.step()
