"""Claims about the Trainer's ways of training: whatever surrounds a step, the optimizer sees what it should, once."""

import shutil
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from transformers import Trainer, TrainerCallback

from hf_automagic.callbacks import EdgeCaseCallback, OptimizerStatsCallback, attach
from hf_automagic.reporting.stats import RunRecord
from hf_automagic.trainer import AutomagicTrainer
from tests.tiny_runs import (
    CONTEXT,
    InOrder,
    TinyRegression,
    arguments,
    assert_same_bits,
    inner,
    language,
    logged_losses,
    regression_points,
    seen_losses,
    tiny_adapter,
    training_logs,
    weights,
)

# peft still uses names that transformers has replaced
pytestmark = pytest.mark.filterwarnings("ignore:.* is deprecated and will be removed in v6:FutureWarning:transformers")

CLASSES = pytest.mark.parametrize("cls", [Trainer, AutomagicTrainer], ids=["stock", "mixin"])


def regression(tmp_path, cls=Trainer, points=None, optim: str = "automagic", **changes) -> Any:
    return cls(
        model=changes.pop("model", None) or TinyRegression(),
        args=arguments(tmp_path, optim=optim, lr_scheduler_type="constant", **changes),
        train_dataset=InOrder(regression_points(64) if points is None else points),
        eval_dataset=regression_points(4),
        callbacks=[OptimizerStatsCallback(plots=False)],
    )


def assert_same_runs(left: Trainer, right: Trainer) -> None:
    """Weights and states of two runs, to the bit."""
    assert_same_bits(weights(left.model), weights(right.model))
    for p, q in zip(left.model.parameters(), right.model.parameters(), strict=True):
        assert_same_bits(inner(left).state.get(p, {}), inner(right).state.get(q, {}))


# gradient accumulation


@CLASSES
@pytest.mark.parametrize("normalisation", ["mean of micro-batches", "share of the batch's tokens"])
def test_four_micro_batches_are_one_step_with_the_loss_that_is_logged(tmp_path, cls, normalisation):
    build = regression if normalisation == "mean of micro-batches" else language
    trainer = build(tmp_path, cls, optim=CONTEXT, gradient_accumulation_steps=4)
    trainer.train()
    assert trainer.model_accepts_loss_kwargs is (build is language)
    assert int(inner(trainer).param_groups[0]["counters"]["applied"]) == trainer.state.global_step == 4
    assert logged_losses(trainer) == seen_losses(trainer)


@pytest.mark.matrix("T18")
def test_four_micro_batches_step_as_one_large_batch(tmp_path):
    small = regression(tmp_path, gradient_accumulation_steps=4)
    large = regression(tmp_path, per_device_train_batch_size=8)
    for trainer in (small, large):
        trainer.train()
    torch.testing.assert_close(weights(small.model), weights(large.model), rtol=0, atol=1e-6)


# clipping


def uneven_points() -> list[dict[str, torch.Tensor]]:
    return [{"x": point["x"], "y": point["y"] * (1 + i % 5)} for i, point in enumerate(regression_points(64))]


@pytest.mark.matrix("T18")
def test_our_clipping_does_what_the_trainers_does(tmp_path):
    theirs = regression(tmp_path, points=uneven_points(), max_grad_norm=0.5)
    ours = regression(tmp_path, points=uneven_points(), max_grad_norm=0.0, optim_args="max_grad_norm=0.5")
    neither = regression(tmp_path, points=uneven_points(), max_grad_norm=0.0)
    for trainer in (theirs, ours, neither):
        trainer.train()
    theirs, ours, neither = (weights(trainer.model) for trainer in (theirs, ours, neither))
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-7)
    assert max(float((theirs[name] - p).abs().max()) for name, p in neither.items()) > 1e-5


# the scaler of fp16


def with_scaler(trainer: Trainer) -> Trainer:
    """Gives accelerate the scaler that fp16 has on a GPU."""
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    return trainer


@CLASSES
@pytest.mark.matrix("T7")
def test_a_step_that_the_scaler_skips_leaves_no_trace(tmp_path, cls):
    points = regression_points(12)
    overflowing = [{"x": torch.full((4,), torch.inf), "y": torch.zeros(1)}] * 2
    changes = {"optim": CONTEXT, "max_grad_norm": 0.0, "logging_nan_inf_filter": False}
    plain = regression(tmp_path / "plain", cls, points, max_steps=6, **changes)
    hit = regression(tmp_path / "hit", cls, [*points[:4], *overflowing, *points[4:]], max_steps=7, **changes)
    for trainer in (plain, hit):
        with_scaler(trainer).train()
    assert inner(plain).c_optim.history() == inner(hit).c_optim.history()
    assert_same_runs(plain, hit)
    assert [log["optim/skipped_steps"] for log in training_logs(hit)] == [0.0] * 7  # it was the scaler's
    assert not torch.isfinite(torch.tensor(logged_losses(hit)[2]))


# compiled models


COMPILERS = [
    pytest.param("eager", id="eager"),
    pytest.param(
        "inductor",
        id="inductor",
        marks=[
            pytest.mark.slow,
            pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler, and there is no g++"),
        ],
    ),
]


@CLASSES
@pytest.mark.parametrize("backend", COMPILERS)
@pytest.mark.matrix("T18")
def test_a_compiled_model_keeps_its_names_and_shows_its_losses(tmp_path, cls, backend, monkeypatch):
    for name in ("ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_DYNAMO_MODE"):
        monkeypatch.setenv(name, "")  # TrainingArguments set them, and older ones for all that comes after
        monkeypatch.delenv(name)
    trainer = language(
        tmp_path, cls, tiny_adapter(), torch_compile=True, torch_compile_backend=backend, save_strategy="steps"
    )
    trainer.train()
    assert isinstance(trainer.model_wrapped, torch._dynamo.OptimizedModule)
    names = [name for group in inner(trainer).param_groups for name in group["names"]]
    assert not [name for name in names if "_orig_mod" in name]
    assert logged_losses(trainer) == seen_losses(trainer)
    torch._dynamo.reset()


# gradient checkpointing


@CLASSES
@pytest.mark.matrix("T18")
def test_gradient_checkpointing_changes_no_step_and_counts_no_loss_twice(tmp_path, cls):
    plain, checkpointed = (
        language(tmp_path / str(on), cls, gradient_checkpointing=on, gradient_accumulation_steps=2)
        for on in (False, True)
    )
    for trainer in (plain, checkpointed):
        trainer.train()
    assert logged_losses(checkpointed) == seen_losses(checkpointed)
    assert_same_runs(plain, checkpointed)


# evaluation in between


@CLASSES
def test_evaluations_in_between_change_nothing(tmp_path, cls):
    plain = language(tmp_path / "plain", cls)
    evaluated = language(tmp_path / "evaluated", cls, eval_strategy="steps", eval_steps=1)
    for trainer in (plain, evaluated):
        trainer.train()
    assert sum("eval_loss" in log for log in evaluated.state.log_history) == 4
    assert inner(plain).c_optim.history() == inner(evaluated).c_optim.history()
    assert_same_runs(plain, evaluated)


def test_generation_in_between_is_not_listened_to(tmp_path):
    class Generates(TrainerCallback):
        """Looks at what the model says."""

        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **event: Any) -> None:
            model.generate(torch.tensor([[3, 4]]), max_new_tokens=2, do_sample=False)

    trainer = language(tmp_path)
    trainer.add_callback(Generates())
    trainer.train()
    assert logged_losses(trainer) == seen_losses(trainer)


# a batch size that has to be found


FINDS_ITS_BATCH = {"auto_find_batch_size": True, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}


class RunsOutOfMemory(TinyRegression):
    """Has no room for more than three points from its third step on."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        self.calls += self.training
        if len(x) > 3 and self.calls > 5:
            raise RuntimeError("CUDA out of memory. Tried to allocate more than there is")
        return super().forward(x, y)


@CLASSES
@pytest.mark.matrix("T16")
def test_an_attempt_that_ran_out_of_memory_is_not_counted(tmp_path, cls):
    points = regression_points(64)
    points[9]["x"] = torch.full((4,), torch.nan)  # in the second step of both attempts
    trainer = regression(tmp_path, cls, points, model=RunsOutOfMemory(), **FINDS_ITS_BATCH)
    attach(trainer, EdgeCaseCallback())
    trainer.train()

    counters = {name: int(count) for name, count in inner(trainer).param_groups[0]["counters"].items()}
    assert (counters["applied"], counters["skipped"]) == (1 + 3, 1 + 1)  # two steps of the first attempt, four then
    assert trainer._train_batch_size == 3
    assert trainer.state.global_step == 4

    logs = training_logs(trainer)
    assert [log["step"] for log in logs] == [1, 2, 3, 4]
    assert [log["optim/skipped_steps"] for log in logs] == [0.0, 1.0, 1.0, 1.0]
    assert [log["optim/events"] for log in logs] == [0.0, 1.0, 1.0, 1.0]
    record = RunRecord.read(tmp_path)
    assert [row["step"] for row in record.rows] == [1, 2, 3, 4]
    assert [(event["step"], event["logged_at"]) for event in record.events] == [(2, 2)]
    assert [group["initial_lr"] for group in inner(trainer).param_groups] == [1e-3, 1e-3]


@CLASSES
def test_a_lone_micro_batch_before_the_lack_of_memory_belongs_to_no_step(tmp_path, cls):
    trainer = regression(tmp_path, cls, optim=CONTEXT, model=RunsOutOfMemory(), **FINDS_ITS_BATCH)
    trainer.train()
    assert logged_losses(trainer) == seen_losses(trainer, skip=2)


# searches


@CLASSES
def test_each_trial_of_a_search_starts_afresh(tmp_path, cls):
    points = regression_points(64)
    points[4]["x"] = torch.full((4,), torch.nan)
    trainer = regression(tmp_path, cls, points, optim=CONTEXT, optim_args="lr_search=true")
    trainer.model_init, kept = TinyRegression, []
    for rate in (1e-3, 1e-5, 1e-3):  # as hyperparameter_search does it
        trainer.args.learning_rate = rate
        trainer.train()
        kept.append((inner(trainer), weights(trainer.model), training_logs(trainer)))
    optimizers, ends, logs = zip(*kept, strict=True)
    assert len({id(optimizer) for optimizer in optimizers}) == 3
    assert [o.param_groups[0]["initial_lr"] for o in optimizers] == [1e-3, 1e-5, 1e-3]
    assert_same_bits(ends[0], ends[2])
    assert not all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert [[log["optim/skipped_steps"] for log in trial] for trial in logs] == [[0.0, 0.0, 1.0, 1.0]] * 3
    assert optimizers[0].c_optim.history() == optimizers[2].c_optim.history()
    assert len(optimizers[0].c_optim.history().losses) == 3


# a model that makes no loss of its own


class Outputs(nn.Module):
    """Returns predictions alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.linear(x)}


def test_shares_made_by_compute_loss_func_are_added_up(tmp_path):
    points = [{"x": point["x"], "labels": point["y"]} for point in regression_points(64)]

    def compute_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        return (outputs["logits"] - labels).square().sum() / num_items_in_batch

    trainer = AutomagicTrainer(
        model=Outputs(),
        args=arguments(tmp_path, optim=CONTEXT, gradient_accumulation_steps=4, remove_unused_columns=False),
        train_dataset=InOrder(points),
        compute_loss_func=compute_loss,
        callbacks=[OptimizerStatsCallback(plots=False)],
    )
    trainer.train()
    assert logged_losses(trainer) == seen_losses(trainer)
