"""Claims about the Trainer mixin: true rates, losses for the context, skipped NaNs, exact resumes, one section."""

import logging
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from transformers import Trainer, TrainerCallback

from hf_automagic import Automagic
from hf_automagic.callbacks import EdgeCaseCallback, OptimizerStatsCallback
from hf_automagic.reporting.card import START
from hf_automagic.reporting.stats import RunRecord
from hf_automagic.trainer import STOP_AFTER, AutomagicTrainer, AutomagicTrainerMixin
from tests.tiny_runs import (
    InOrder,
    Recorder,
    TinyRegression,
    argument_values,
    arguments,
    assert_same_bits,
    inner,
    logged_losses,
    regression_points,
    seen_losses,
    sentences,
    tiny_adapter,
    tiny_llama,
    tiny_tokenizer,
    training_logs,
    weights,
)

# peft and trl still use names that transformers has replaced
pytestmark = pytest.mark.filterwarnings("ignore:.* is deprecated and will be removed in v6:FutureWarning:transformers")


def without_plots() -> OptimizerStatsCallback:
    return OptimizerStatsCallback(plots=False)


def regression(tmp_path, points, *, options=None, callbacks=(), **changes) -> AutomagicTrainer:
    return AutomagicTrainer(
        model=TinyRegression(),
        args=arguments(tmp_path, lr_scheduler_type="constant", **changes),
        train_dataset=InOrder(points),
        eval_dataset=regression_points(4),
        optimizer_cls_and_kwargs=(Automagic, {"lr": 1e-3, "min_8bit_size": 0, **(options or {})}),
        callbacks=[without_plots(), *callbacks],
    )


def language(tmp_path, model, cls=AutomagicTrainer, **changes) -> Trainer:
    return cls(
        model=model,
        args=arguments(tmp_path, **changes),
        train_dataset=sentences(32),
        eval_dataset=sentences(4),
        optimizer_cls_and_kwargs=(Automagic, {"lr": 1e-3}),
        callbacks=[without_plots()] if cls is AutomagicTrainer else None,
    )


# logs


def test_trackers_and_history_get_the_true_rate_beside_the_schedule(tmp_path):
    tracker = Recorder()
    trainer = AutomagicTrainer(
        model=TinyRegression(),
        args=arguments(tmp_path, lr_scheduler_type="linear"),
        train_dataset=InOrder(regression_points(16)),
        optimizer_cls_and_kwargs=(Automagic, {"lr": 1e-3, "self_tuning": False}),
        callbacks=[without_plots(), tracker],
    )
    trainer.train()
    for shown, log in zip(tracker.logs, training_logs(trainer), strict=False):
        assert shown["optim/lr_mean"] == log["optim/lr_mean"] == pytest.approx(log["learning_rate"])
        assert all(type(value) is float for key, value in shown.items() if key.startswith("optim/"))
    assert [log["learning_rate"] for log in training_logs(trainer)] == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])


def test_evaluations_and_the_summary_get_no_keys(tmp_path):
    trainer = regression(tmp_path, regression_points(16), eval_strategy="steps", eval_steps=2)
    trainer.train()
    others = [log for log in trainer.state.log_history if "loss" not in log]
    assert len(others) == 3
    assert not any(key.startswith("optim/") for log in others for key in log)


def test_a_foreign_optimizer_shows_its_rates_too(tmp_path):
    trainer = regression(tmp_path, regression_points(16))
    trainer.optimizer_cls_and_kwargs = (torch.optim.AdamW, {"lr": 1e-3})
    trainer.train()
    assert training_logs(trainer)[-1]["optim/lr_mean"] == pytest.approx(1e-3)


def test_callbacks_can_be_taken_off(tmp_path):
    trainer = regression(tmp_path, regression_points(16))
    trainer.remove_callback(OptimizerStatsCallback)
    trainer.train()
    assert "optim/lr_mean" in training_logs(trainer)[0]
    assert not (tmp_path / "optimizer_stats").exists()


# losses


@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_context_sees_the_losses_that_are_logged(tmp_path, accumulation):
    points = regression_points(8 * accumulation)
    trainer = regression(tmp_path, points, options={"context": True}, gradient_accumulation_steps=accumulation)
    trainer.train()
    assert logged_losses(trainer) == seen_losses(trainer)


def test_shares_of_a_tokens_mean_are_added_up(tmp_path):
    trainer = language(tmp_path, tiny_llama(), gradient_accumulation_steps=3)
    trainer.optimizer_cls_and_kwargs = (Automagic, {"lr": 1e-3, "context": True})
    assert trainer.model_accepts_loss_kwargs
    trainer.train()
    assert logged_losses(trainer) == seen_losses(trainer)


# steps that are not finite


@pytest.mark.matrix("T7")
def test_a_nan_batch_shows_in_the_logs_and_leaves_no_trace_in_the_weights(tmp_path):
    points = regression_points(12)
    spoilt = [*points[:4], *[{"x": torch.full((4,), torch.nan), "y": torch.zeros(1)}] * 2, *points[4:]]
    plain = regression(tmp_path / "plain", points, max_steps=6)
    hit = regression(tmp_path / "hit", spoilt, max_steps=7)
    for trainer in (plain, hit):
        trainer.train()

    logs = training_logs(hit)
    assert torch.isfinite(torch.tensor([log["loss"] for log in logs])).all()  # logging_nan_inf_filter hides it
    assert [log["optim/skipped_steps"] for log in logs] == [0, 0, 1, 1, 1, 1, 1]
    assert [log["optim/skipped_in_a_row"] for log in logs] == [0, 0, 1, 0, 0, 0, 0]
    assert [event["code"] for event in RunRecord.read(tmp_path / "hit").events] == ["NONFINITE_STEP"]

    assert_same_bits(weights(plain.model), weights(hit.model))
    for p, q in zip(plain.model.parameters(), hit.model.parameters(), strict=True):
        assert_same_bits(inner(plain).state[p], inner(hit).state[q])
    assert float(inner(plain).param_groups[0]["log_rate"]) == float(inner(hit).param_groups[0]["log_rate"])


def test_a_run_that_stands_still_stops_with_one_sentence(tmp_path):
    points = [{"x": torch.full((4,), torch.nan), "y": torch.zeros(1)}] * 2 * (STOP_AFTER + 10)
    trainer = regression(tmp_path, points, max_steps=STOP_AFTER + 10, logging_steps=10)
    before = weights(trainer.model)
    with pytest.raises(
        RuntimeError, match=f"{STOP_AFTER} steps in a row had a gradient that is not finite, the last in"
    ):
        trainer.train()
    assert_same_bits(before, weights(trainer.model))
    assert trainer.state.global_step == STOP_AFTER
    assert [event["code"] for event in RunRecord.read(tmp_path).events] == ["NONFINITE_STEP", "NONFINITE_STUCK"]


# resumes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.matrix("T2")
def test_a_resumed_adapter_trains_as_if_never_stopped(tmp_path, dtype):
    whole = language(tmp_path, tiny_adapter(dtype), max_steps=6, save_strategy="steps", save_steps=3)
    whole.train()
    resumed = language(tmp_path, tiny_adapter(dtype), max_steps=6)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    adapters = [p for p in resumed.model.parameters() if p.requires_grad]
    assert {p.dtype for p in adapters} == {dtype}
    assert_same_bits(weights(whole.model), weights(resumed.model))
    for p, q in zip((p for p in whole.model.parameters() if p.requires_grad), adapters, strict=True):
        assert_same_bits(inner(whole).state[p], inner(resumed).state[q])


def test_a_stock_trainer_loses_the_dtype_that_the_mixin_keeps(tmp_path):
    language(tmp_path, tiny_adapter(torch.bfloat16), save_strategy="steps", save_steps=2).train()
    stock = language(tmp_path, tiny_adapter(torch.bfloat16), cls=Trainer)
    stock.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert {p.dtype for p in stock.model.parameters() if p.requires_grad} == {torch.float32}


def test_a_trainer_that_resumes_itself_trains_the_parameters_of_the_model(tmp_path):
    trainer = language(tmp_path, tiny_adapter(torch.bfloat16), save_strategy="steps", save_steps=2)
    trainer.train()
    end = weights(trainer.model)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    known = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert known == {id(p) for p in trainer.model.parameters() if p.requires_grad}
    assert_same_bits(end, weights(trainer.model))


class Upcast(TrainerCallback):
    def on_train_begin(self, args, state, control, model=None, **kwargs):
        for p in model.parameters():
            p.data = p.data.float()


def test_a_cast_that_the_user_makes_in_training_stays(tmp_path):
    trainer = language(tmp_path, tiny_llama(torch.bfloat16), bf16=True)
    trainer.add_callback(Upcast())
    trainer.train()
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}


def test_the_best_model_keeps_its_dtype(tmp_path):
    trainer = language(
        tmp_path,
        tiny_adapter(torch.bfloat16),
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint is not None
    assert {p.dtype for p in trainer.model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("missing", ["optimizer.pt", "scheduler.pt"])
@pytest.mark.matrix("T1")
def test_a_checkpoint_without_the_optimizer_is_refused(tmp_path, missing):
    regression(tmp_path, regression_points(16), save_strategy="steps", save_steps=2).train()
    (tmp_path / "checkpoint-4" / missing).unlink()
    trainer = regression(tmp_path, regression_points(16), max_steps=6)
    with pytest.raises(ValueError, match=r"checkpoint-4 .* lacks optimizer.pt or scheduler.pt.*allow_fresh_optimizer"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_a_fresh_optimizer_can_be_allowed(tmp_path, caplog):
    regression(tmp_path, regression_points(16), save_strategy="steps", save_steps=2, save_only_model=True).train()
    trainer = regression(tmp_path, regression_points(16), max_steps=6)
    trainer.allow_fresh_optimizer = True
    with caplog.at_level(logging.WARNING, logger="hf_automagic"):
        trainer.train(str(tmp_path / "checkpoint-4"))
    assert "checkpoint-4 lacks the optimizer's state: the optimizer starts afresh" in caplog.text
    assert training_logs(trainer)[-1]["step"] == 6


# cards


@pytest.mark.parametrize("kind", ["plain", "peft"])
@pytest.mark.matrix("T22")
def test_the_card_has_the_section_once_after_two_trainings(tmp_path, kind):
    yaml = pytest.importorskip("yaml")
    trainer = language(tmp_path, tiny_llama() if kind == "plain" else tiny_adapter(), max_steps=2)
    for _ in range(2):
        trainer.train()
        trainer.save_model()  # PEFT writes a card of its own
        trainer.create_model_card()
    text = (tmp_path / "README.md").read_text()
    assert text.count(START) == 1
    metadata = yaml.safe_load(text.split("---\n")[1])
    assert {"hf_automagic", "optimizer:Automagic"} <= set(metadata["tags"])
    assert metadata["library_name"] == ("transformers" if kind == "plain" else "peft")
    assert "## Optimizer: Automagic" in text
    assert "adamw" not in text.lower()


def test_trl_trainers_take_the_mixin(tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")

    class AutomagicSFTTrainer(AutomagicTrainerMixin, trl.SFTTrainer):
        """SFT that shows its optimizer."""

    trainer = AutomagicSFTTrainer(
        model=tiny_adapter(),
        args=trl.SFTConfig(
            **argument_values(tmp_path, max_steps=2, save_strategy="steps", save_steps=2), bf16=False, max_length=16
        ),
        train_dataset=datasets.Dataset.from_dict({"text": ["w3 w4 w5 w6 w7"] * 8}),
        processing_class=tiny_tokenizer(),
        optimizer_cls_and_kwargs=(Automagic, {"lr": 1e-3}),
        callbacks=[without_plots()],
    )
    for _ in range(2):
        trainer.train()
        trainer.create_model_card()
    assert {"mean_token_accuracy", "optim/lr_mean"} <= training_logs(trainer)[-1].keys()
    text = (tmp_path / "README.md").read_text()
    assert text.count(START) == 1
    assert "trl" in text
    assert "optimizer:Automagic" in text


@pytest.mark.matrix("T22")
def test_a_push_carries_files_plots_and_the_section(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    pushed: list[set[str]] = []
    trainer = language(tmp_path, tiny_llama(), max_steps=2)
    trainer.remove_callback(OptimizerStatsCallback)
    trainer.add_callback(OptimizerStatsCallback())
    trainer.train()
    trainer.hub_model_id = "someone/mine"
    upload = Upload(tmp_path, pushed)
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: upload, raising=False)
    monkeypatch.setattr("transformers.trainer.upload_folder", upload.upload_folder, raising=False)  # before 5.1
    trainer.push_to_hub()
    (files,) = pushed
    assert {"README.md", "optimizer_stats/stats.jsonl", "optimizer_stats/learning_rates.png"} <= files
    assert START in (tmp_path / "README.md").read_text()


class Upload:
    """Stands for the hub's client: notes what lies in the folder when it would be uploaded."""

    def __init__(self, folder: Path, pushed: list[set[str]]) -> None:
        self.folder, self.pushed = folder, pushed

    def upload_folder(self, *, ignore_patterns: list[str], **others: object) -> None:
        assert ignore_patterns == ["_*", "checkpoint-*"]
        files = {str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file()}
        self.pushed.append({name for name in files if not name.startswith(("_", "checkpoint-"))})


# the whole of it


def test_the_optimizer_introduces_itself_once(tmp_path, caplog):
    trainer = regression(tmp_path, regression_points(16), max_steps=1)
    with caplog.at_level(logging.INFO, logger="hf_automagic"):
        trainer.train()
        trainer.train()
    told = [record.getMessage() for record in caplog.records if "trainable elements" in record.getMessage()]
    assert told == [inner(trainer).describe()]


def test_our_callbacks_are_not_doubled(tmp_path):
    own = EdgeCaseCallback()
    trainer = regression(tmp_path, regression_points(16), callbacks=[own])
    assert [cb for cb in trainer.callback_handler.callbacks if isinstance(cb, EdgeCaseCallback)] == [own]


KILLED_RUN = """
import os, signal, sys
from pathlib import Path
from transformers import TrainerCallback
from hf_automagic import Automagic
from hf_automagic.trainer import AutomagicTrainer
from tests.tiny_runs import InOrder, TinyRegression, arguments, regression_points

class Kill(TrainerCallback):
    def on_step_begin(self, args, state, control, **event):
        if state.global_step == 5:
            os.kill(os.getpid(), signal.SIGKILL)

AutomagicTrainer(
    model=TinyRegression(),
    args=arguments(Path(sys.argv[1]), max_steps=9),
    train_dataset=InOrder(regression_points(32)),
    optimizer_cls_and_kwargs=(Automagic, {"lr": 1e-3}),
    callbacks=[Kill()],
).train()
"""


@pytest.mark.slow
def test_a_killed_training_leaves_its_statistics_up_to_the_last_log(tmp_path):
    repository = Path(__file__).resolve().parents[1]
    run = subprocess.run([sys.executable, "-c", KILLED_RUN, str(tmp_path)], cwd=repository, capture_output=True)
    assert run.returncode == -signal.SIGKILL, run.stderr.decode()
    record = RunRecord.read(tmp_path)
    assert [row["step"] for row in record.rows] == [1, 2, 3, 4, 5]
    assert record.config["optimizer"] == "Automagic"
