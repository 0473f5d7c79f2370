"""Six steps and six more are twelve, to the bit, for every optimizer: weights, states, counters, context, events."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from transformers import TrainerCallback

from hf_automagic import list_optimizers
from hf_automagic.callbacks import OptimizerStatsCallback
from hf_automagic.optim.events import EventCode
from hf_automagic.reporting.stats import RunRecord
from hf_automagic.trainer import AutomagicTrainer
from tests.tiny_runs import (
    InOrder,
    arguments,
    inner,
    regression_points,
    sentences,
    tiny_adapter,
    training_logs,
    weights,
)

# peft still uses names that transformers has replaced
pytestmark = pytest.mark.filterwarnings("ignore:.* is deprecated and will be removed in v6:FutureWarning:transformers")

STEPS, HALF = 12, 6
STEPS_OF_AN_EPOCH = 8  # a border lies within each half's training, and the first is crossed after the resume
SPOILT = (3, 8)  # steps whose gradient is not a number, one on each side of the resume
EVERY_CASE = list(itertools.product(list_optimizers(), [torch.float32, torch.bfloat16], [1, 4]))
# each string once; the slow test crosses them
SOME_CASES = [
    (name, (torch.bfloat16, torch.float32)[i % 2], (1, 4)[i // 2 % 2]) for i, name in enumerate(list_optimizers())
]


class Spoils(TrainerCallback):
    """Makes the gradients of some steps NaN, and draws from the generator that dropout uses."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **event: Any) -> None:
        if state.global_step + 1 in SPOILT:
            next(p for p in model.parameters() if p.grad is not None).grad.view(-1)[0] = torch.nan
        torch.rand(1)


def build(folder: Path, optim: str, dtype: torch.dtype, accumulation: int, **changes: Any) -> AutomagicTrainer:
    return AutomagicTrainer(
        model=tiny_adapter(dtype),
        args=arguments(
            folder,
            optim=optim,
            optim_args="min_8bit_size=0, context=true",
            max_steps=STEPS,
            gradient_accumulation_steps=accumulation,
            lr_scheduler_type="cosine",
            max_grad_norm=0.0,
            **changes,
        ),
        train_dataset=sentences(STEPS_OF_AN_EPOCH * 2 * accumulation),
        callbacks=[OptimizerStatsCallback(plots=False), Spoils()],
    )


def plain(value: Any) -> Any:
    """What can be compared with ==: tensors by dtype and bits, a NaN equal to itself."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), plain(value.tolist())
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return "nan" if isinstance(value, float) and math.isnan(value) else value


def facts(trainer: AutomagicTrainer) -> dict[str, Any]:
    """Everything that twelve steps leave behind."""
    optimizer = inner(trainer)
    logs = [
        {k: v for k, v in log.items() if k == "loss" or k.startswith("optim/")}
        for log in training_logs(trainer)
        if log["step"] > HALF
    ]
    return plain(
        {
            "weights": weights(trainer.model),
            "optimizer": optimizer.state_dict(),
            "events": [vars(event) for event in optimizer.events()],
            "history": vars(optimizer.c_optim.history()),
            "scheduler": {k: v for k, v in trainer.lr_scheduler.state_dict().items() if k != "lr_lambdas"},
            "logs": logs,
        }
    )


def check(tmp_path: Path, optim: str, dtype: torch.dtype, accumulation: int) -> None:
    whole = build(tmp_path, optim, dtype, accumulation, save_strategy="steps", save_steps=HALF)
    whole.train()
    kept = RunRecord.read(tmp_path)
    resumed = build(tmp_path, optim, dtype, accumulation)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{HALF}"))
    expected, actual = facts(whole), facts(resumed)
    for name, value in expected.items():
        assert actual[name] == value, name
    counters = inner(resumed).param_groups[0]["counters"]
    assert (int(counters["applied"]), int(counters["skipped"])) == (STEPS - 2, 2)
    assert [event["step"] for event in expected["events"] if event["code"] == EventCode.NONFINITE_STEP] == list(SPOILT)
    assert whole.state.epoch == resumed.state.epoch == STEPS / STEPS_OF_AN_EPOCH
    assert {p.dtype for p in resumed.model.parameters() if p.requires_grad} == {dtype}
    again = RunRecord.read(tmp_path)
    assert [row["step"] for row in again.rows] == [row["step"] for row in kept.rows]
    assert again.events == kept.events


@pytest.mark.parametrize(("optim", "dtype", "accumulation"), SOME_CASES, ids=str)
@pytest.mark.matrix("T1", "T2")
def test_six_and_six_steps_through_the_trainer_are_twelve(tmp_path, optim, dtype, accumulation):
    check(tmp_path, optim, dtype, accumulation)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optim", "dtype", "accumulation"), [case for case in EVERY_CASE if case not in SOME_CASES], ids=str
)
@pytest.mark.matrix("T1", "T2")
def test_six_and_six_steps_are_twelve_in_every_combination(tmp_path, optim, dtype, accumulation):
    check(tmp_path, optim, dtype, accumulation)


@pytest.mark.slow
@pytest.mark.matrix("T1")
def test_a_run_that_stops_after_every_step_is_the_run_that_never_stopped(tmp_path):
    changes = {"save_strategy": "steps", "save_steps": 1}
    whole = build(tmp_path / "whole", "automagic_coptim_8bit", torch.bfloat16, 1)
    whole.train()
    for step in range(1, STEPS + 1):
        part = build(tmp_path / "parts", "automagic_coptim_8bit", torch.bfloat16, 1, **changes)
        part.add_callback(StopsAt(step))
        part.train(resume_from_checkpoint=step > 1)
    expected, actual = facts(whole), facts(part)
    for name in ("weights", "optimizer", "events", "history"):
        assert actual[name] == expected[name], name


class StopsAt(TrainerCallback):
    """Ends the training after a step, as somebody who presses Ctrl-C does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **event: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


class Wide(nn.Module):
    """A regression on rows long enough for several blocks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(200, 8)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (self.linear(x.repeat(1, 50)).sum(-1, keepdim=True) - y).square().mean()}


@pytest.mark.parametrize(
    "change", ["block_size=64", "codec=affine", "codec=dynamic", "quantize_states=false", "error_correction=true"]
)
@pytest.mark.matrix("T15")
def test_states_that_are_stored_otherwise_are_converted_and_that_is_said(tmp_path, caplog, change):
    def run(steps: int, options: str, **changes: Any) -> AutomagicTrainer:
        values = {"optim": "automagic_8bit", "optim_args": options, "max_steps": steps, **changes}
        return AutomagicTrainer(
            model=Wide(),
            args=arguments(tmp_path, **values),
            train_dataset=InOrder(regression_points(32)),
            callbacks=[OptimizerStatsCallback(plots=False)],
        )

    run(HALF, "min_8bit_size=0", save_strategy="steps", save_steps=HALF).train()
    resumed = run(HALF + 2, f"min_8bit_size=0, {change}")
    with caplog.at_level("INFO", "hf_automagic"):
        resumed.train(resume_from_checkpoint=True)
    told = [r.getMessage() for r in caplog.records if "have been converted" in r.getMessage()]
    assert told == ["the states of 1 parameters were stored in another way and have been converted"]
    name, value = change.split("=")
    assert str(inner(resumed).param_groups[0][name]).lower() == value
    assert int(inner(resumed).param_groups[0]["counters"]["applied"]) == HALF + 2
    assert all(bool(p.isfinite().all()) for p in resumed.model.parameters())
