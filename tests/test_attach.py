"""Bare parameters step and say what they cannot know; names and `attach(model)` bring roles, rails and pairs."""

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_automagic import Automagic, Automagic_CameAMP_8Bit, AutomagicConfig, param_groups
from hf_automagic.optim.events import EventCode
from hf_automagic.optim.roles import Role
from tests.peft_cases import adapt, tuner_named

FEATURES = {"allora": True, "eta": 4.0, "lora_rank_penalty": True, "rank_penalty_strength": 50.0}
KNOWN = ("role", "names", "pairs", "scalings", "ranks", "weight_decay", "min_lr", "max_lr", "lr", "is_full_weight")


class HandWritten(nn.Module):
    """A frozen weight with a pair beside it, large enough for 8 bits, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(300, 300).requires_grad_(False)
        self.lora_A = nn.Linear(300, 16, bias=False)
        self.lora_B = nn.Linear(16, 300, bias=False)
        self.head = nn.Linear(300, 2)
        self.scaling = 0.5

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.base(x) + self.lora_B(self.lora_A(x)) * self.scaling)


def make(source: str, **options: Any) -> tuple[nn.Module, Automagic]:
    torch.manual_seed(0)
    model = HandWritten()
    sources = {"bare": model.parameters(), "named": model.named_parameters(), "groups": None}
    params = (
        param_groups(model, weight_decay=options.get("weight_decay", 0.0)) if source == "groups" else sources[source]
    )
    return model, Automagic(params, **{"lr": 1e-4, **options})


def train(model: nn.Module, optimizer: Automagic, seeds: range) -> None:
    for seed in seeds:
        x = torch.randn(4, 300, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step(loss=loss)


def told(optimizer: Automagic) -> list[tuple[Any, ...]]:
    return [tuple(group[name] for name in KNOWN) for group in optimizer.param_groups]


# names


def test_names_tell_roles_and_pairs():
    _, optimizer = make("named", weight_decay=0.1)
    found = [(g["role"], g["names"], g["pairs"], g["weight_decay"]) for g in optimizer.param_groups]
    assert found == [
        ("lora_A", ["lora_A.weight"], [0], 0.1),
        ("lora_B", ["lora_B.weight"], [0], 0.1),
        ("adapter", ["head.weight"], [-1], 0.1),
        ("bias", ["head.bias"], [-1], 0.0),
    ]


@pytest.mark.parametrize("name", ["lora", "dora", "embedding"])
def test_names_of_a_peft_model_make_its_pairs(name):
    model = adapt(tuner_named(name))
    by_name, by_layer = Automagic(model.named_parameters()), Automagic(param_groups(model))
    pairs = by_name.pair_ranks()
    assert pairs is not None
    assert pairs.positions == by_layer.pair_ranks().positions


@pytest.mark.parametrize("features", [{"allora": True, "eta": 4.0}, FEATURES], ids=["allora", "rank penalty too"])
def test_pairs_by_name_change_the_steps(features):
    ends = []
    for source, options in (("named", features), ("named", {}), ("bare", features), ("bare", {})):
        model, optimizer = make(source, lr=1e-3, **options)
        train(model, optimizer, range(20))
        ends.append(model.lora_B.weight.detach().clone())
    assert not torch.equal(ends[0], ends[1])
    assert torch.equal(ends[2], ends[3])


# bare parameters


def test_bare_parameters_step_on_the_adapters_rails():
    model, optimizer = make("bare")
    (group,) = optimizer.param_groups
    assert (group["role"], group["min_lr"], group["max_lr"]) == ("adapter", 1e-7, 1e-3)
    before = model.lora_A.weight.detach().clone(), model.lora_B.weight.detach().clone()
    train(model, optimizer, range(2))
    assert not torch.equal(model.lora_A.weight, before[0])
    assert not torch.equal(model.lora_B.weight, before[1])


@pytest.mark.parametrize("options", [{"allora": True}, {"lora_rank_penalty": True}], ids=str)
def test_an_option_without_pairs_is_said_once_with_the_line_that_helps(options, caplog):
    model, optimizer = make("bare", **options)
    train(model, optimizer, range(2))
    said = [record for record in caplog.records if "LoRA" in record.getMessage()]
    assert [record.levelno for record in said] == [logging.WARNING]
    assert f"{next(iter(options))}: off" in said[0].getMessage()
    assert "optimizer.attach(model) turns them on" in said[0].getMessage()


@pytest.mark.parametrize(
    ("source", "options"), [("bare", {}), ("named", {"allora": True}), ("groups", FEATURES)], ids=str
)
def test_nothing_is_said_where_nothing_is_missing(source, options, caplog):
    make(source, **options)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_frozen_parameters_take_no_memory_and_may_thaw():
    model, optimizer = make("bare")
    _, alone = make("groups")
    planned = optimizer.memory_stats()
    train(model, optimizer, range(2))
    assert planned.parameters == optimizer.memory_stats().parameters == alone.memory_stats().parameters
    assert model.base.weight not in optimizer.state
    model.base.requires_grad_(True)
    before = model.base.weight.detach().clone()
    train(model, optimizer, range(2))
    assert not torch.equal(model.base.weight, before)
    assert optimizer.memory_stats().parameters == planned.parameters + 300 * 301


# attach


@pytest.mark.parametrize("source", ["bare", "named"])
def test_attach_makes_the_groups_that_the_model_tells(source):
    model, optimizer = make(source, weight_decay=0.1, loraplus_lr_ratio=4.0)
    optimizer.attach(model)
    assert told(optimizer) == told(make("groups", weight_decay=0.1, loraplus_lr_ratio=4.0)[1])
    assert {g["role"]: g["max_lr"] for g in optimizer.param_groups}["full"] == pytest.approx(
        Role.FULL.rail_scale(True, 300) * AutomagicConfig.max_lr
    )


def test_attached_parameters_step_as_those_of_the_groups():
    ends = []
    for source in ("bare", "groups"):
        model, optimizer = make(source, lr=1e-3, **FEATURES)
        if source == "bare":
            optimizer.attach(model)
        train(model, optimizer, range(12))
        ends.append([p.detach().clone() for p in model.parameters()])
    assert all(map(torch.equal, *ends))


def test_attach_says_what_it_turned_on(caplog):
    model, optimizer = make("bare", allora=True)
    with caplog.at_level(logging.INFO, "hf_automagic"):
        optimizer.attach(model)
    assert caplog.records[-1].getMessage() == "allora: on 1 LoRA pairs"


def test_attach_in_the_middle_of_a_run_loses_nothing():
    model, optimizer = make("bare", context=True, lr_granularity="element")
    train(model, optimizer, range(5))
    model.head.bias.grad = torch.full_like(model.head.bias, torch.nan)
    optimizer.step()
    states = {p: {name: t.clone() for name, t in state.items()} for p, state in optimizer.state.items()}
    shared = {name: optimizer.param_groups[0][name] for name in ("counters", "events", "context_state", "host_steps")}
    rate = optimizer.param_groups[0]["log_rate"]
    for _ in range(2):
        optimizer.attach(model)
        assert all(
            torch.equal(optimizer.state[p][name], t) for p, state in states.items() for name, t in state.items()
        )
        assert all(optimizer.param_groups[0][name] is value for name, value in shared.items())
        assert [group["log_rate"] for group in optimizer.param_groups] == [rate] * 4
    train(model, optimizer, range(5, 7))
    assert [int(t["step"]) for t in optimizer.state.values()] == [7] * 4
    assert optimizer.events()[0].code is EventCode.NONFINITE_STEP


def test_a_groups_own_options_and_schedule_go_on():
    model = HandWritten()
    pair = [
        {"params": [model.lora_A.weight, model.lora_B.weight], "lr": 2e-4, "max_lr": 5e-3, "betas": (0.5, 0.9, 0.9)}
    ]
    optimizer = Automagic(
        [*pair, {"params": model.head.parameters(), "weight_decay": 0.2}], lr=1e-4, loraplus_lr_ratio=2
    )
    for group in optimizer.param_groups:
        group["lr"] *= 0.5
    for _ in range(2):
        optimizer.attach(model)
        found = {g["role"]: (g["lr"], g["initial_lr"], g["max_lr"], g["weight_decay"]) for g in optimizer.param_groups}
        assert found["lora_A"] == (1e-4, 2e-4, 5e-3, 0.0)
        assert found["lora_B"] == (2e-4, 4e-4, 5e-3, 0.0)
        assert found["full"] == (5e-5, 1e-4, pytest.approx(Role.FULL.rail_scale(True, 300) * 1e-3), 0.2)
        assert found["bias"][3] == 0.0
        assert [g["betas"][0] for g in optimizer.param_groups] == [0.5, 0.5, 0.8, 0.8]


def test_attach_knows_new_modules():
    model, optimizer = make("bare")
    optimizer.attach(model, new_modules=["head"])
    assert {g["role"]: g["max_lr"] for g in optimizer.param_groups}["new"] > AutomagicConfig.max_lr
    with pytest.raises(TypeError, match="no module 'heat'; did you mean 'head'"):
        optimizer.attach(model, new_modules=["heat"])


def test_parameters_of_another_model_stay_as_they_are():
    model, other = HandWritten(), nn.Linear(3, 3)
    optimizer = Automagic([*model.parameters(), *other.parameters()])
    optimizer.attach(model)
    last = optimizer.param_groups[-1]
    assert (last["role"], last["params"][0] is other.weight, len(last["params"])) == ("adapter", True, 2)
    with pytest.raises(ValueError, match="Bilinear trains none of this optimizer's parameters"):
        optimizer.attach(nn.Bilinear(2, 2, 2))


def test_an_attached_run_resumes_from_its_file():
    model, optimizer = make("bare", **FEATURES)
    optimizer.attach(model)
    train(model, optimizer, range(3))
    copy, fresh = make("groups", **FEATURES)
    copy.load_state_dict(model.state_dict())
    fresh.load_state_dict(optimizer.state_dict())
    train(model, optimizer, range(3, 6))
    train(copy, fresh, range(3, 6))
    assert all(map(torch.equal, model.parameters(), copy.parameters()))


def test_the_seeds_classes_take_names_and_models():
    model = HandWritten()
    optimizer = Automagic_CameAMP_8Bit(model.parameters())
    assert optimizer.pair_ranks() is None
    optimizer.attach(model)
    assert optimizer.pair_ranks().positions == (1,)
    assert Automagic_CameAMP_8Bit(model.named_parameters()).pair_ranks().positions == (1,)
