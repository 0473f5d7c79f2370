"""Claims about optimizer_stats/: whole lines after any crash, continued by a resume, nothing private in them."""

import json
import math
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hf_automagic import Automagic
from hf_automagic.optim.events import Event, EventCode
from hf_automagic.reporting.stats import (
    RunRecord,
    StatsWriter,
    describe_event,
    describe_run,
    optimizer_name,
    read_lines,
    write_atomically,
)


@pytest.fixture
def writer(tmp_path) -> StatsWriter:
    writer = StatsWriter(tmp_path)
    writer.start(0)
    return writer


def steps(writer: StatsWriter) -> list[int]:
    return [row["step"] for row in RunRecord.read(writer.folder).rows]


def test_rows_come_back_as_they_were_written(writer):
    writer.append_row(10, {"loss": 0.5, "optim/lr_mean": 1e-4, "note": "text is left out"})
    rows = RunRecord.read(writer.folder).rows
    assert rows == [{"schema_version": 1, "loss": 0.5, "optim/lr_mean": 1e-4, "step": 10}]


def test_a_number_that_is_none_is_null_in_strict_json(writer):
    writer.append_row(1, {"loss": math.nan, "grad_norm": math.inf})
    text = (writer.folder / "stats.jsonl").read_text()
    row = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert row["loss"] is None
    assert row["grad_norm"] is None
    assert RunRecord.read(writer.folder).series("loss") == ([], [])


@pytest.mark.parametrize("cut", range(1, 40, 6))
def test_a_line_that_was_cut_off_costs_only_itself(writer, cut):
    for step in (1, 2):
        writer.append_row(step, {"loss": 1.0})
    path = writer.folder / "stats.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    assert steps(writer) in ([1], [1, 2])
    writer.append_row(3, {"loss": 1.0})
    assert steps(writer) in ([1, 3], [1, 2, 3])


def test_a_resume_continues_the_files_from_its_checkpoint(writer):
    for step in (1, 2, 3):
        writer.append_row(step, {"loss": 1.0})
        writer.append_event({"step": step, "number": step, "logged_at": step})
    writer.start(2)
    assert steps(writer) == [1, 2]
    assert writer.last_event() == 2


def test_a_run_begun_anew_starts_the_files_anew(writer):
    writer.append_row(1, {"loss": 1.0})
    writer.start(0)
    assert read_lines(writer.folder / "stats.jsonl") == []


def test_an_event_is_kept_by_the_step_that_logged_it(writer):
    writer.append_event(describe_event(Event(4, EventCode.EDGE_CASE, 0.97, 0.95, "slows down", 1), logged_at=10))
    (event,) = read_lines(writer.folder / "events.jsonl")
    assert (event["code"], event["step"], event["logged_at"], event["value"]) == ("EDGE_CASE", 4, 10, 0.97)
    writer.start(5)
    assert writer.last_event() == 0


def test_a_file_is_replaced_as_a_whole(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    write_atomically(path, "old")

    def fail(*args: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="the disk is full"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert all(other == path or other.name.startswith("_") for other in tmp_path.iterdir())


def test_a_folder_without_statistics_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"'{tmp_path.name}' holds neither stats.jsonl nor config.json"):
        RunRecord.read(tmp_path)


def test_a_run_is_found_from_its_output_folder(writer):
    writer.append_row(1, {"loss": 1.0})
    assert RunRecord.read(writer.folder.parent) == RunRecord.read(writer.folder)


def an_optimizer() -> Automagic:
    groups = [{"params": [torch.nn.Parameter(torch.ones(8, 16))], "role": role} for role in ("lora_A", "full")]
    return Automagic(groups, lr=2e-4)


def test_the_config_tells_what_repeats_the_run():
    args = SimpleNamespace(optim="adamw_torch", learning_rate=2e-4, seed=7, lr_scheduler_type="cosine")
    config = describe_run(an_optimizer(), args)
    assert config["optimizer"] == "Automagic"
    assert config["options"]["lr"] == 2e-4
    assert config["training"] == {"learning_rate": 2e-4, "seed": 7, "lr_scheduler_type": "cosine"}
    assert config["memory"]["total_bytes"] == an_optimizer().memory_stats().total_bytes
    assert [(g["role"], g["max_lr"]) for g in config["groups"]] == [("lora_A", 3e-4), ("full", 3e-4)]
    assert config["versions"]["torch"] == torch.__version__
    assert json.loads(json.dumps(config)) == config


def test_the_config_tells_nothing_about_machine_or_user(tmp_path):
    args = SimpleNamespace(output_dir=str(tmp_path), hub_token="secret", run_name="mine", seed=7)
    text = json.dumps(describe_run(an_optimizer(), args))
    for private in (str(tmp_path), socket.gethostname(), os.getcwd(), str(Path.home()), "secret", "mine"):
        assert private not in text


@pytest.mark.parametrize(
    ("requested", "name"),
    [("automagic_8bit", "automagic_8bit"), ("adamw_torch_fused", "Automagic"), (None, "Automagic")],
)
def test_the_true_optimizer_is_named(requested, name):
    assert optimizer_name(an_optimizer(), requested) == name


def test_a_foreign_optimizer_is_not_named_like_ours():
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    assert optimizer_name(sgd, "automagic_8bit") == "SGD"
    assert describe_run(sgd)["optimizer"] == "SGD"
    assert describe_run(sgd)["groups"][0]["initial_lr"] == 0.1


ENDLESS_RUN = """
import sys
from hf_automagic.reporting.stats import StatsWriter
writer = StatsWriter(sys.argv[1])
writer.start(0)
for step in range(1, 10**9):
    writer.append_row(step, {"loss": 1.0, "optim/lr_mean": 1e-4})
    if step == 50:
        print("running", flush=True)
"""


def test_a_killed_run_leaves_whole_lines(tmp_path):
    run = subprocess.Popen([sys.executable, "-c", ENDLESS_RUN, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    with run, run.stdout:
        assert run.stdout.readline() == "running\n"
        run.send_signal(signal.SIGKILL)
    rows = RunRecord.read(tmp_path).rows
    assert len(rows) >= 50
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
