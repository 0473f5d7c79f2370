"""Claims about callbacks: what the optimizer did reaches logs, trackers and files, once, under any Trainer."""

import json
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
from hf_automagic.callbacks import (
    EdgeCaseCallback,
    EffectiveLRCallback,
    MemoryCallback,
    OptimizerStatsCallback,
    attach,
    snapshot_at_log,
)
from hf_automagic.reporting.snapshot import OptimizerSnapshot
from hf_automagic.reporting.stats import RunRecord
from tests.tiny_runs import (
    InOrder,
    Recorder,
    TinyRegression,
    arguments,
    regression_points,
    sentences,
    tiny_adapter,
    training_logs,
)

# peft still uses names that transformers has replaced
pytestmark = pytest.mark.filterwarnings("ignore:.* is deprecated and will be removed in v6:FutureWarning:transformers")

OURS = (Automagic, {"lr": 1e-3})


def stock_trainer(tmp_path, *callbacks, points=None, optimizer=OURS, **changes) -> Trainer:
    points = regression_points(16) if points is None else points
    return Trainer(
        model=TinyRegression(),
        args=arguments(tmp_path, lr_scheduler_type="constant", **changes),
        train_dataset=InOrder(points),
        optimizer_cls_and_kwargs=optimizer,
        callbacks=list(callbacks),
    )


def with_a_bad_batch(count: int = 16) -> list[dict[str, torch.Tensor]]:
    points = regression_points(count)
    points[4]["x"] = torch.full((4,), torch.nan)  # the third batch of two
    return points


@pytest.mark.matrix("T12")
def test_keys_reach_the_history_of_a_stock_trainer(tmp_path):
    trainer = stock_trainer(tmp_path, OptimizerStatsCallback(plots=False))
    trainer.train()
    logs = training_logs(trainer)
    assert [log["step"] for log in logs] == [1, 2, 3, 4]
    for log in logs:
        added = {key: value for key, value in log.items() if key.startswith("optim/")}
        assert {"optim/lr_mean", "optim/state_mb", "optim/skipped_steps"} <= added.keys()
        assert all(type(value) is float for value in added.values())
    assert not any(key.startswith("optim/") for key in trainer.state.log_history[-1])


def test_attached_callbacks_come_before_the_trackers(tmp_path):
    late, early = Recorder(), Recorder()
    trainer = stock_trainer(tmp_path / "late", late, EffectiveLRCallback())
    trainer.train()
    assert "optim/lr_mean" not in late.logs[0]
    trainer = stock_trainer(tmp_path / "early", early)
    attach(trainer, EffectiveLRCallback())
    trainer.train()
    assert early.logs[0]["optim/lr_mean"] == training_logs(trainer)[0]["optim/lr_mean"]


def test_attaching_twice_attaches_once(tmp_path):
    trainer = stock_trainer(tmp_path, OptimizerStatsCallback(plots=False))
    attach(trainer)
    attach(trainer)
    kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
    assert kinds.count(OptimizerStatsCallback) == kinds.count(EdgeCaseCallback) == 1


@pytest.mark.matrix("T12")
def test_tensorboards_file_holds_the_keys(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = stock_trainer(tmp_path, report_to="tensorboard")
    attach(trainer, EffectiveLRCallback())
    trainer.train()
    (file,) = tmp_path.glob("runs/*/events*")
    written = EventAccumulator(str(file)).Reload()
    rates = [point.value for point in written.Scalars("train/optim/lr_mean")]
    assert rates == pytest.approx([log["optim/lr_mean"] for log in training_logs(trainer)])


@pytest.mark.matrix("T12")
def test_trackio_receives_the_keys_as_floats(tmp_path, monkeypatch):
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    for module in ("trackio.utils", "trackio.sqlite_storage"):
        monkeypatch.setattr(f"{module}.TRACKIO_DIR", tmp_path / "trackio")
    trainer = stock_trainer(tmp_path, report_to="trackio", project="tiny", run_name="run")
    attach(trainer)
    trainer.train()
    written = [row for row in SQLiteStorage.get_logs("tiny", "run") if "train/loss" in row]
    for row, log in zip(written, training_logs(trainer), strict=True):
        ours = {key: value for key, value in log.items() if key.startswith("optim/")}
        assert {"optim/lr_mean", "optim/lr_full", "optim/skipped_steps", "optim/state_mb"} <= ours.keys()
        assert {key: row[f"train/{key}"] for key in ours} == ours
        assert all(type(row[f"train/{key}"]) is float for key in ours)


def test_wandb_receives_the_keys_offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    for name, value in {"MODE": "offline", "DIR": str(tmp_path), "SILENT": "true", "DISABLE_GIT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    trainer = stock_trainer(tmp_path / "out", report_to="wandb", run_name="run")
    attach(trainer)
    trainer.train()
    summary, last = dict(wandb.run.summary), training_logs(trainer)[-1]
    wandb.finish()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    ours = {key: value for key, value in last.items() if key.startswith("optim/")}
    assert {"optim/lr_mean", "optim/lr_full", "optim/skipped_steps", "optim/state_mb"} <= ours.keys()
    assert {key: summary[f"train/{key}"] for key in ours} == ours


@pytest.mark.matrix("T12")
def test_all_callbacks_of_a_log_share_one_read(tmp_path, monkeypatch):
    reads = []
    take = OptimizerSnapshot.take
    monkeypatch.setattr(OptimizerSnapshot, "take", lambda optimizer: reads.append(1) or take(optimizer))
    trainer = stock_trainer(tmp_path)
    attach(trainer, OptimizerStatsCallback(plots=False), EdgeCaseCallback(), MemoryCallback(), EffectiveLRCallback())
    trainer.train()
    assert len(reads) == len(training_logs(trainer)) == 4
    trainer.train()  # begins at step 1 with the same optimizer: nothing of the first run is taken for news
    assert len(reads) == 8


def test_a_second_run_reads_the_optimizer_anew_and_counts_from_its_own_start(tmp_path):
    trainer = stock_trainer(tmp_path, EffectiveLRCallback(), points=with_a_bad_batch(), max_steps=4)
    trainer.train()
    first = snapshot_at_log(trainer.optimizer, trainer.state)
    trainer.train()
    second = snapshot_at_log(trainer.optimizer, trainer.state)
    for snapshot in (first, second):
        assert (snapshot.applied_steps, snapshot.skipped_steps, snapshot.event_count) == (3, 1, 1)
        assert [event.step for event in snapshot.events] == [3]
    assert OptimizerSnapshot.take(trainer.optimizer).skipped_steps == 2
    assert [event.number for event in second.events] == [2]


def test_a_skipped_step_is_told_once(tmp_path, caplog):
    events = EdgeCaseCallback()
    trainer = stock_trainer(tmp_path, events, points=with_a_bad_batch())
    with caplog.at_level(logging.WARNING, logger="hf_automagic"):
        trainer.train()
    assert [(event["code"], event["step"], event["logged_at"]) for event in events.events] == [
        ("NONFINITE_STEP", 3, 3)
    ]
    told = [r.getMessage() for r in caplog.records if r.name == "hf_automagic.callbacks"]
    assert len(told) == 1
    assert told[0].startswith("step 3, NONFINITE_STEP: ")


def test_events_are_kept_in_the_trainers_state(tmp_path):
    trainer = stock_trainer(
        tmp_path, EdgeCaseCallback(), points=with_a_bad_batch(), save_strategy="steps", save_steps=4
    )
    trainer.train()
    kept = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())["stateful_callbacks"]
    assert kept["EdgeCaseCallback"]["attributes"]["events"][0]["code"] == "NONFINITE_STEP"
    assert EdgeCaseCallback.from_state(kept["EdgeCaseCallback"]).told == 1


def test_files_tell_the_same_as_the_logs(tmp_path):
    trainer = stock_trainer(tmp_path, OptimizerStatsCallback(plots=False), points=with_a_bad_batch())
    trainer.train()
    record = RunRecord.read(tmp_path)
    assert record.series("optim/lr_mean")[1] == [log["optim/lr_mean"] for log in training_logs(trainer)]
    assert record.series("optim/skipped_steps")[1] == [0, 0, 1, 1]
    assert [event["code"] for event in record.events] == ["NONFINITE_STEP"]
    assert record.config["memory"]["total_bytes"] == trainer.optimizer.optimizer.memory_stats().total_bytes


def test_a_second_training_starts_the_files_anew(tmp_path):
    trainer = stock_trainer(tmp_path, OptimizerStatsCallback(plots=False), points=with_a_bad_batch())
    trainer.train()
    trainer.train_dataset = InOrder(regression_points(16))
    trainer.train()
    record = RunRecord.read(tmp_path)
    assert [row["step"] for row in record.rows] == [1, 2, 3, 4]
    assert record.events == []


def test_a_resume_continues_the_files(tmp_path):
    changes = {"points": with_a_bad_batch(), "save_strategy": "steps", "save_steps": 4}
    stock_trainer(tmp_path, OptimizerStatsCallback(plots=False), max_steps=6, **changes).train()
    trainer = stock_trainer(tmp_path, OptimizerStatsCallback(plots=False), max_steps=8, **changes)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    record = RunRecord.read(tmp_path)
    assert [row["step"] for row in record.rows] == list(range(1, 9))
    assert [event["code"] for event in record.events] == ["NONFINITE_STEP"]


KILLED = """
import os, signal, sys
from pathlib import Path
from transformers import TrainerCallback
from tests.test_callbacks import OptimizerStatsCallback, stock_trainer

class Kill(TrainerCallback):
    def on_step_begin(self, args, state, control, **event):
        if state.global_step == 7:
            os.kill(os.getpid(), signal.SIGKILL)

stock_trainer(Path(sys.argv[1]), OptimizerStatsCallback(plots=False), Kill(), max_steps=8, logging_steps=2).train()
"""


@pytest.mark.slow
def test_a_run_that_is_killed_leaves_its_files_readable_up_to_the_last_log(tmp_path):
    root = Path(__file__).resolve().parents[1]
    run = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], cwd=root, capture_output=True)
    assert run.returncode == -signal.SIGKILL
    record = RunRecord.read(tmp_path)
    assert [row["step"] for row in record.rows] == [2, 4, 6]
    assert all("optim/lr_mean" in row for row in record.rows)
    assert record.config["memory"]["total_bytes"]


def test_plots_are_drawn_at_the_end(tmp_path):
    pytest.importorskip("matplotlib")
    stock_trainer(tmp_path, OptimizerStatsCallback()).train()
    assert {"learning_rates.png", "memory.png"} <= {path.name for path in (tmp_path / "optimizer_stats").iterdir()}


def test_without_matplotlib_a_run_ends_with_a_hint(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with caplog.at_level(logging.WARNING, logger="hf_automagic"):
        stock_trainer(tmp_path, OptimizerStatsCallback()).train()
    assert "pip install hf_automagic[plot]" in caplog.text
    assert len(RunRecord.read(tmp_path).rows) == 4


def test_the_rate_of_prodigy_is_seen(tmp_path):
    prodigyopt = pytest.importorskip("prodigyopt")
    trainer = stock_trainer(tmp_path, EffectiveLRCallback(), optimizer=(prodigyopt.Prodigy, {"lr": 1.0}))
    trainer.train()
    group = trainer.optimizer.param_groups[0]
    last = training_logs(trainer)[-1]
    assert last["learning_rate"] == 1.0
    assert last["optim/lr_mean"] == pytest.approx(group["d"] * group["lr"])
    assert "optim/skipped_steps" not in last


@pytest.mark.parametrize("optimizer", [OURS, (torch.optim.AdamW, {"lr": 1e-3})], ids=["ours", "adamw"])
def test_memory_is_that_of_the_states(tmp_path, optimizer):
    trainer = stock_trainer(tmp_path, MemoryCallback(), optimizer=optimizer)
    trainer.train()
    elements = sum(p.numel() for p in trainer.model.parameters())
    inner = trainer.optimizer.optimizer
    expected = inner.memory_stats().total_bytes if optimizer is OURS else 8 * elements + 4 * len(inner.state)
    assert training_logs(trainer)[-1]["optim/state_mb"] == pytest.approx(expected / 2**20)


def test_trainables_that_no_group_knows_are_told_once(tmp_path, caplog):
    trainer = stock_trainer(tmp_path, EdgeCaseCallback())
    frozen = trainer.model.layers[2].bias.requires_grad_(False)
    trainer.create_optimizer()
    frozen.requires_grad_(True)
    with caplog.at_level(logging.WARNING, logger="hf_automagic"):
        trainer.train()
    told = [r.getMessage() for r in caplog.records if r.name == "hf_automagic.callbacks"]
    assert len(told) == 1
    assert told[0].startswith("1 trainable parameter(s) are in no group")
    assert "layers.2.bias" in told[0]


class SwitchesAdapter(TrainerCallback):
    """Goes on with another adapter after two steps."""

    def on_step_end(self, args, state, control, model=None, **event):
        if state.global_step == 2:
            model.set_adapter("second")


def test_switching_the_adapter_in_a_run_is_told_once(tmp_path, caplog):
    peft = pytest.importorskip("peft")
    model = tiny_adapter()
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.set_adapter("default")
    args = arguments(tmp_path, optim="automagic_8bit")
    trainer = Trainer(model, args, train_dataset=sentences(32), callbacks=[EdgeCaseCallback(), SwitchesAdapter()])
    with caplog.at_level(logging.WARNING, logger="hf_automagic"):
        trainer.train()
    (told,) = [r.getMessage() for r in caplog.records if r.name == "hf_automagic.callbacks"]
    assert told.startswith(
        "4 trainable parameter(s) are in no group of the optimizer and stay as they are, the first is"
    )
    assert "lora_A.second" in told
