"""Claims about the factory: one call builds for whatever holds parameters, and wrong options stop at the door."""

import logging

import pytest
import torch
from torch import nn

from hf_automagic import Automagic, AutomagicConfig, CustomQuantizationStrategy
from hf_automagic.factory import create_automagic_optimizer, optimizer_cls_and_kwargs, parse_options
from hf_automagic.optim.roles import LARGEST_WIDTH_SCALE, NEW_SCALE, PRETRAINED_SCALE
from hf_automagic.registry import get_optimizer_info, list_optimizers


def tiny_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 4), nn.LayerNorm(4), nn.Linear(4, 2))


FORMS = {
    "model": lambda m: m,
    "parameters": lambda m: m.parameters(),
    "list": lambda m: list(m.parameters()),
    "named": lambda m: m.named_parameters(),
    "groups": lambda m: [{"params": list(m[0].parameters()), "max_lr": 1e-2}, {"params": list(m[2].parameters())}],
}


@pytest.mark.parametrize("optim", list_optimizers())
@pytest.mark.parametrize("form", FORMS)
def test_whatever_holds_parameters_gets_an_optimizer_that_steps(form, optim):
    model = tiny_model()
    optimizer = create_automagic_optimizer(FORMS[form](model), optim, lr=1e-3)
    before = [p.detach().clone() for g in optimizer.param_groups for p in g["params"]]
    for _ in range(2):
        model(torch.ones(3, 8)).square().sum().backward()
        optimizer.step()
    after = [p for g in optimizer.param_groups for p in g["params"]]
    assert type(optimizer) is Automagic
    assert len(after) == (4 if form == "groups" else 6)
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_options_win_over_the_record_and_the_record_over_the_defaults():
    optimizer = create_automagic_optimizer(tiny_model(), "came_8bit", lr=1e-3, block_size=64)
    assert optimizer.config == AutomagicConfig(lr=1e-3, self_tuning=False, block_size=64)
    assert create_automagic_optimizer(tiny_model(), "came_8bit", self_tuning=True).config == AutomagicConfig()


def test_options_win_over_a_preset_and_a_preset_over_the_record():
    optimizer = create_automagic_optimizer(tiny_model(), preset="conservative", error_correction=False)
    assert optimizer.config == AutomagicConfig(lr_granularity="element")
    optimizer = create_automagic_optimizer(tiny_model(), "automagic_coptim_8bit", preset="aggressive")
    assert (optimizer.config.vector_precision, optimizer.config.context) == ("log16", True)
    assert parse_options("preset=balanced, max_lr=1e-2") == {"preset": "balanced", "max_lr": 1e-2}
    with pytest.raises(TypeError, match="no preset 'agressive'; did you mean 'aggressive'"):
        create_automagic_optimizer(tiny_model(), preset="agressive")


def test_a_quantization_strategy_reaches_the_optimizer():
    strategy = CustomQuantizationStrategy()
    assert create_automagic_optimizer(tiny_model(), quantization_strategy=strategy).quantization_strategy is strategy


def test_biases_and_norms_do_not_decay():
    groups = create_automagic_optimizer(tiny_model(), weight_decay=0.1).param_groups
    assert {g["role"]: g["weight_decay"] for g in groups} == {"bias": 0.0, "norm": 0.0, "full": 0.1}


def test_a_new_module_gets_the_adapters_rails():
    groups = create_automagic_optimizer(tiny_model(), new_modules=["2"]).param_groups
    rails = {(g["role"], g["names"][0]): g["max_lr"] / AutomagicConfig.max_lr for g in groups}
    narrow = LARGEST_WIDTH_SCALE
    assert rails[("new", "2.weight")] == pytest.approx(NEW_SCALE * narrow)
    assert rails[("bias", "2.bias")] == pytest.approx(narrow)
    assert {g["role"]: g["rail_steps"] for g in groups} == {"bias": 100, "norm": 100, "new": 50, "full": 100}
    assert rails[("full", "0.weight")] == rails[("bias", "0.bias")] == pytest.approx(PRETRAINED_SCALE * narrow)


def test_lora_plus_reaches_b_alone():
    model = nn.ModuleDict({"lora_A": nn.Linear(8, 2, bias=False), "lora_B": nn.Linear(2, 8, bias=False)})
    groups = create_automagic_optimizer(model, lr=1e-4, loraplus_lr_ratio=4.0).param_groups
    assert {g["role"]: g["lr"] for g in groups} == {"lora_A": 1e-4, "lora_B": 4e-4}


def test_the_banner_is_logged_once(caplog):
    with caplog.at_level(logging.INFO, logger="hf_automagic"):
        optimizer = create_automagic_optimizer(tiny_model())
    assert [r.getMessage() for r in caplog.records if r.levelno == logging.INFO].count(optimizer.describe()) == 1


class WithLoss(nn.Module):
    """Returns its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (self.weight * x).square().mean()}


@pytest.mark.parametrize("optim", list_optimizers())
def test_a_model_is_listened_to_where_the_context_asks(optim):
    model = WithLoss()
    optimizer = create_automagic_optimizer(model, optim)
    asks = bool(get_optimizer_info(optim).options.get("context"))
    assert len(model._forward_hooks) == asks
    loss = model(torch.arange(3.0))["loss"]
    loss.backward()
    optimizer.step()
    assert list(optimizer.c_optim.history().losses) == [pytest.approx(loss.item())] * asks


def test_a_loop_of_accelerate_needs_nothing_else():
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = WithLoss()
    optimizer = create_automagic_optimizer(model, "automagic_coptim", lr=1e-4)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.5, total_iters=4)
    prepared, wrapped, schedule = accelerator.prepare(model, optimizer, schedule)
    losses = []
    for batch in torch.randn(6, 3, generator=torch.Generator().manual_seed(0)):
        with accelerator.accumulate(prepared):
            loss = prepared(batch)["loss"]
            accelerator.backward(loss)
            wrapped.step()
            schedule.step()
            wrapped.zero_grad()
        losses.append(loss.item())
    pairs = torch.tensor(losses).view(3, 2).mean(1)
    assert list(optimizer.c_optim.history().losses) == pytest.approx(pairs.tolist())
    assert int(optimizer.param_groups[0]["counters"]["applied"]) == 3


def test_a_loop_that_steps_with_a_closure_as_lightning_does_needs_nothing_else():
    model = WithLoss()
    optimizer = create_automagic_optimizer(model, "automagic_coptim", lr=1e-4)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(torch.arange(3.0))["loss"]
        loss.backward()
        return loss

    before = model.weight.detach().clone()
    loss = optimizer.step(closure=closure)
    assert not torch.equal(before, model.weight)
    assert list(optimizer.c_optim.history().losses) == [loss.item()]


def test_parameters_alone_have_no_loss_to_listen_to():
    optimizer = create_automagic_optimizer(WithLoss().parameters(), context=True)
    assert len(optimizer.loss_intake.hooks) == 0


def test_the_pair_fits_optimizer_cls_and_kwargs():
    cls, kwargs = optimizer_cls_and_kwargs("automagic", {"lr": 1e-3})
    assert (cls, kwargs) == (Automagic, {"quantize_states": False, "lr": 1e-3})
    groups = [{"params": list(tiny_model().parameters()), "weight_decay": 0.1}]
    assert cls(groups, **kwargs).param_groups[0]["weight_decay"] == 0.1


@pytest.mark.parametrize(
    ("error", "match", "model", "options"),
    [
        (TypeError, "no option 'max_l'; did you mean 'max_lr'", tiny_model(), {"max_l": 1}),
        (TypeError, "no optimizer 'automagc'; did you mean", tiny_model(), {"optim": "automagc"}),
        (TypeError, "no module 'hed'", tiny_model(), {"new_modules": ["hed"]}),
        (
            ValueError,
            "new_modules needs the model itself, got list",
            list(tiny_model().parameters()),
            {"new_modules": ["2"]},
        ),
        (ValueError, "no parameter to optimise", iter(()), {}),
        (ValueError, "Sequential has no trainable parameter", tiny_model().requires_grad_(False), {}),
        (ValueError, "lr must be", tiny_model(), {"lr": -1.0}),
    ],
)
def test_what_cannot_be_built_is_refused_in_a_sentence(error, match, model, options):
    with pytest.raises(error, match=match):
        create_automagic_optimizer(model, **options)


@pytest.mark.parametrize(
    ("given", "options"),
    [
        (None, {}),
        ("", {}),
        ("max_lr=3e-4, block_size = 64", {"max_lr": 3e-4, "block_size": 64}),
        ("self_tuning=False,quantize_states=on", {"self_tuning": False, "quantize_states": True}),
        ("betas=0.8:0.99:0.999", {"betas": (0.8, 0.99, 0.999)}),
        ("beta2=0.9", {"betas": (AutomagicConfig.betas[0], 0.9, AutomagicConfig.betas[2])}),
        ("beta1=0.5,betas=0.8:0.99:0.999", {"betas": (0.5, 0.99, 0.999)}),
        ("eps1=1e-20", {"eps": (1e-20, *AutomagicConfig.eps[1:])}),
        ("max_grad_norm=none", {"max_grad_norm": None}),
        ("lr_granularity=element", {"lr_granularity": "element"}),
        ("new_modules=head:model.score", {"new_modules": ("head", "model.score")}),
        (
            {"max_lr": "3e-4", "betas": [0.8, 0.99, 0.999], "new_modules": ["head"]},
            {"max_lr": 3e-4, "betas": [0.8, 0.99, 0.999], "new_modules": ("head",)},
        ),
    ],
)
def test_options_are_read_by_their_type(given, options):
    assert parse_options(given) == options


def test_a_single_beta_leaves_the_records_others():
    assert parse_options("beta1=0.5", {"betas": (0.8, 0.99, 0.999)}) == {"betas": (0.5, 0.99, 0.999)}


@pytest.mark.parametrize(
    ("error", "match", "given"),
    [
        (TypeError, "no option 'max_l_r'; did you mean 'max_lr'", "max_l_r=1"),
        (TypeError, "no option 'beta4'; did you mean", "beta4=1"),
        (ValueError, "must be name=value with commas between, got 'self_tuning'", "self_tuning"),
        (ValueError, r"got '0.99'; write tuples as betas=0.9:0.99:0.999", "betas=(0.9,0.99,0.999)"),
        (ValueError, "got 'a=b=c'", "a=b=c"),
        (ValueError, "got 'max_lr='", "max_lr="),
        (ValueError, "'max_lr' is given twice, as 1 and 2", "max_lr=1,max_lr=2"),
        (ValueError, "'max_lr' does not read 'fast'", "max_lr=fast"),
        (ValueError, "'self_tuning' does not read 'maybe'; write true or false", "self_tuning=maybe"),
        (ValueError, "'beta1' does not read 'x'; write a number", "beta1=x"),
    ],
)
def test_options_that_do_not_read_stop_the_run(error, match, given):
    with pytest.raises(error, match=match):
        parse_options(given)


@pytest.mark.parametrize("name", list_optimizers())
def test_records_reach_the_optimizer(name):
    optimizer = create_automagic_optimizer(tiny_model(), name)
    assert {option: getattr(optimizer.config, option) for option in get_optimizer_info(name).options} == dict(
        get_optimizer_info(name).options
    )
