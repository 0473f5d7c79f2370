"""Claims about schedules: one law for all of them, group["lr"] is theirs and multiplies what the optimizer tunes.

The last class are the ideas of transformers' own checks for displayed learning rates.
"""

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from transformers import SchedulerType, Trainer, TrainerCallback, get_scheduler

from hf_automagic import Automagic, list_optimizers
from hf_automagic.callbacks import EffectiveLRCallback, attach
from tests.tiny_runs import (
    InOrder,
    arguments,
    assert_same_bits,
    inner,
    regression_points,
    tiny_llama,
    training_logs,
    weights,
)

STEPS, WARMUP, LR = 8, 2, 2e-4
# What a type cannot do without, and for those that watch a metric what makes them act within eight steps.
NEEDS: dict[str, dict[str, Any]] = {
    "cosine_with_min_lr": {"min_lr": 1e-5},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
    "warmup_stable_decay": {"num_decay_steps": 3},
    "reduce_lr_on_plateau": {"patience": 1, "factor": 0.5, "threshold": 10.0},
    "greedy": {"patience": 1, "factor": 0.5, "threshold": 10.0, "min_lr": 1e-6},
}
WATCHES_A_METRIC = {"reduce_lr_on_plateau", "greedy"}


class TinyLora(nn.Module):
    """A pair of factors, whose groups step at different rates."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lora_A, self.lora_B = nn.Linear(4, 2, bias=False), nn.Linear(2, 1, bias=False)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (self.lora_B(self.lora_A(x)) - y).square().mean()}


@dataclasses.dataclass
class Seen:
    """What the groups held before and after a step."""

    lr: list[float]
    tuned: list[float]
    lr_after: list[float] = dataclasses.field(default_factory=list)
    applied: list[float] = dataclasses.field(default_factory=list)


class Probe(TrainerCallback):
    """Looks at the groups around each step."""

    def __init__(self) -> None:
        self.steps: list[Seen] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **event: Any) -> None:
        groups = optimizer.param_groups
        self.steps.append(Seen([group["lr"] for group in groups], [tuned_rate(group) for group in groups]))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **event: Any) -> None:
        for group in optimizer.param_groups:
            self.steps[-1].lr_after.append(group["lr"])
            self.steps[-1].applied.append(float(group["effective_lr"]))


def tuned_rate(group: dict[str, Any]) -> float:
    """The rate that the optimizer found, between its rails, before any schedule."""
    if not group["lr_search"]:
        return group["max_lr"]
    found = group["initial_lr"] * float(torch.as_tensor(group.get("log_rate", 0.0)).exp())
    return min(max(found, group["min_lr"]), group["max_lr"])


def run(tmp_path, kind: str, optim_args: str) -> tuple[Trainer, Probe]:
    probe = Probe()
    changes: dict[str, Any] = {}
    if kind in WATCHES_A_METRIC:
        changes = {"eval_strategy": "steps", "eval_steps": 1, "label_names": ["y"]}
    trainer = Trainer(
        model=TinyLora(),
        args=arguments(
            tmp_path,
            optim="automagic",
            optim_args=optim_args,
            learning_rate=LR,
            max_steps=STEPS,
            warmup_steps=WARMUP,
            lr_scheduler_type=kind,
            lr_scheduler_kwargs=NEEDS.get(kind),
            **changes,
        ),
        train_dataset=InOrder(regression_points(2 * STEPS)),
        eval_dataset=regression_points(2),
        callbacks=[probe],
    )
    attach(trainer, EffectiveLRCallback())
    trainer.train()
    return trainer, probe


def schedule_alone(kind: str) -> list[float]:
    """The rates that transformers' schedule gives an optimizer that has no mind of its own."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=LR)
    schedule = get_scheduler(kind, optimizer, WARMUP, STEPS, NEEDS.get(kind))
    rates = []
    for _ in range(STEPS):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


KINDS = [kind.value for kind in SchedulerType]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.matrix("T11")
def test_a_schedule_multiplies_the_tuned_rate_and_stays_the_logged_one(tmp_path, kind):
    trainer, probe = run(tmp_path, kind, "loraplus_lr_ratio=4, lr_search=true")
    starts = [group["initial_lr"] for group in inner(trainer).param_groups]
    assert starts == [LR, 4 * LR]
    for seen in probe.steps:
        assert seen.lr == seen.lr_after
        expected = [lr / start * tuned for lr, start, tuned in zip(seen.lr, starts, seen.tuned, strict=True)]
        assert seen.applied == pytest.approx(expected, rel=1e-5)
    assert len({seen.tuned[0] for seen in probe.steps}) > 1

    scheduled, logs = [seen.lr[0] for seen in probe.steps], training_logs(trainer)
    assert len(set(scheduled)) > 1 or kind == "constant"
    assert [log["learning_rate"] for log in logs] == scheduled
    assert [log["optim/lr_A"] for log in logs] == [seen.applied[0] for seen in probe.steps]
    if kind not in WATCHES_A_METRIC:
        assert scheduled == pytest.approx(schedule_alone(kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.matrix("T11")
def test_without_self_tuning_the_schedule_is_the_rate(tmp_path, kind):
    _, probe = run(tmp_path, kind, "self_tuning=false")
    for seen in probe.steps:
        assert seen.applied == pytest.approx(seen.lr, rel=1e-6)


def test_a_schedule_at_zero_moves_nothing(tmp_path):
    args = arguments(
        tmp_path, optim="automagic", weight_decay=0.5, lr_scheduler_type="linear", warmup_steps=2, max_steps=1
    )
    trainer = Trainer(TinyLora(), args, train_dataset=InOrder(regression_points(2)))
    trainer.train()
    assert_same_bits(weights(TinyLora()), weights(trainer.model))
    assert inner(trainer).get_learning_rates() == [0.0, 0.0]


class TestDisplayedRates:
    """What transformers checks of the rates that its Trainer displays, for each of our strings."""

    @pytest.mark.parametrize("optim", list_optimizers())
    def test_before_training_every_group_shows_the_rate_that_was_asked_for(self, tmp_path, optim):
        trainer = Trainer(tiny_llama(), arguments(tmp_path, optim=optim, learning_rate=1e-9))
        trainer.create_optimizer_and_scheduler(num_training_steps=10)
        assert set(trainer.get_learning_rates()) == {1e-9}

    @pytest.mark.parametrize("optim", list_optimizers())
    def test_the_display_rises_through_the_warmup_and_falls_along_the_cosine(self, tmp_path, optim):
        rows = [{"input_ids": [3, 4, 5, 6], "labels": [3, 4, 5, 6]}] * 48
        changes = {"max_steps": 24, "warmup_steps": 5, "lr_scheduler_type": "cosine", "learning_rate": 2e-4}
        trainer = Trainer(tiny_llama(), arguments(tmp_path, optim=optim, **changes), train_dataset=rows)
        trainer.train()
        shown = [log["learning_rate"] for log in training_logs(trainer)]
        top = shown.index(max(shown))
        assert (top, shown[top]) == (5, 2e-4)
        assert shown[: top + 1] == sorted(set(shown[: top + 1]))
        assert shown[top:] == sorted(set(shown[top:]), reverse=True)
        assert shown[-1] == pytest.approx(0, abs=5e-6)


@pytest.mark.parametrize("backend", ["eager", "compile"])
def test_a_schedule_that_climbs_ends_at_the_rail(backend):
    layer = nn.Linear(8, 8)
    optimizer = Automagic(layer.parameters(), lr=1e-4, backend=backend, max_lr=1e-3, rail_steps=0)
    for factor in (0.5, 1.0, 25.0):
        optimizer.param_groups[0]["lr"] = factor * 1e-4
        layer(torch.ones(1, 8)).sum().backward()
        optimizer.step()
        torch.testing.assert_close(float(optimizer.param_groups[0]["effective_lr"]), min(factor, 1.0) * 1e-3)
