"""Claims about training adapters: whatever tuner made them, they learn at their own rails and resume bit for bit."""

import io
from typing import Any

import pytest
import torch
from torch import nn

from hf_automagic import create_automagic_optimizer
from tests.peft_cases import IGNORE_OLD_NAME, TUNERS, Tuner, adapt, tuner_named

pytestmark = IGNORE_OLD_NAME


def step(tuner: Tuner, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    tuner.loss(model).backward()
    optimizer.step()


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    """What the Trainer loads of what it saved."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("tuner", TUNERS, ids=lambda t: t.name)
def test_an_adapter_learns_and_resumes_bit_for_bit(tuner):
    model = adapt(tuner).eval()  # without dropout
    start = trained(model)
    optimizer = create_automagic_optimizer(model, lr=1e-3, weight_decay=0.01)
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert {g["weight_decay"] for g in optimizer.param_groups if g["role"] in ("magnitude", "bias", "norm")} <= {0.0}
    for _ in range(2):
        step(tuner, model, optimizer)
    assert any(not torch.equal(start[name], value) for name, value in trained(model).items())

    resumed = adapt(tuner).eval()
    resumed.load_state_dict(model.state_dict())
    successor = create_automagic_optimizer(resumed, lr=1e-3, weight_decay=0.01)
    successor.load_state_dict(through_a_file(optimizer.state_dict()))
    step(tuner, model, optimizer)
    step(tuner, resumed, successor)
    after, again = trained(model), trained(resumed)
    assert after.keys() == again.keys()
    assert all(torch.equal(after[name], again[name]) for name in after)


def test_an_adapter_keeps_its_rails_beside_full_weights():
    rails = {g["role"]: g["max_lr"] for g in create_automagic_optimizer(adapt(tuner_named("saved"))).param_groups}
    assert rails["lora_B"] == pytest.approx(8 * rails["lora_A"])
    assert rails["new"] > rails["lora_B"]
    assert rails["embedding"] == rails["norm"] == rails["lora_A"]
