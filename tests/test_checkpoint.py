"""Claims about checkpoints on disk: the newest whole one is found, and a broken one is named, never resumed."""

import json
import logging
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from transformers import Trainer

from hf_automagic import cli
from hf_automagic.callbacks import CheckpointCallback
from hf_automagic.checkpoint import MANIFEST, find_problems, find_resumable_checkpoint, stays_inside, write_manifest
from hf_automagic.checkpoint_files import check_archive
from hf_automagic.checkpoint_report import diagnose
from tests.kill_points import trainer
from tests.tiny_runs import arguments, assert_same_bits, inner, sentences, tiny_adapter, weights

# peft still uses names that transformers has replaced
pytestmark = pytest.mark.filterwarnings("ignore:.* is deprecated and will be removed in v6:FutureWarning:transformers")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a run of four steps, with two checkpoints."""
    folder = tmp_path_factory.mktemp("saved")
    trainer(folder).train()
    return folder


@pytest.fixture(scope="module")
def six_steps(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """A run that nothing interrupted."""
    whole = trainer(tmp_path_factory.mktemp("whole"), max_steps=6, save_strategy="no")
    whole.train()
    return whole


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of that output folder, to be broken."""
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


def assert_resumes(folder: Path, whole: Trainer) -> None:
    """Resumes from the newest whole checkpoint, and ends where the uninterrupted run ends."""
    resumed = trainer(folder, max_steps=whole.state.global_step, save_strategy="no")
    resumed.train(resume_from_checkpoint=True)
    assert_same_bits(weights(whole.model), weights(resumed.model))
    for p, q in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert_same_bits(inner(whole).state[p], inner(resumed).state[q])


# what is whole


def test_a_saved_checkpoint_is_whole_by_manifest_and_by_structure(folder):
    assert find_problems(folder / "checkpoint-4") == []
    noted = json.loads((folder / "checkpoint-4" / MANIFEST).read_text())["files"]
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= set(noted)
    (folder / "checkpoint-4" / MANIFEST).unlink()
    assert find_problems(folder / "checkpoint-4") == []


def test_the_newest_by_number_is_found(folder):
    shutil.copytree(folder / "checkpoint-4", folder / "checkpoint-10")
    state = folder / "checkpoint-10" / "trainer_state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "global_step": 10}))
    write_manifest(folder / "checkpoint-10")
    (folder / "checkpoint-notes").mkdir()
    assert find_resumable_checkpoint(folder) == folder / "checkpoint-10"


def test_without_any_checkpoint_there_is_none(tmp_path):
    assert find_resumable_checkpoint(tmp_path) is None
    assert find_resumable_checkpoint(tmp_path / "absent") is None


def test_a_stock_trainer_can_have_the_manifest(tmp_path):
    stock = Trainer(
        model=tiny_adapter(),
        args=arguments(tmp_path, max_steps=1, save_strategy="steps", save_steps=1),
        train_dataset=sentences(8),
        callbacks=[CheckpointCallback()],
    )
    stock.train()
    assert "adapter_model.safetensors" in json.loads((tmp_path / "checkpoint-1" / MANIFEST).read_text())["files"]
    assert find_problems(tmp_path / "checkpoint-1") == []


# what is broken


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def remove(path: Path) -> None:
    path.unlink()


def flip_bits(path: Path) -> None:
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 100] = bytes(byte ^ 1 for byte in content[middle : middle + 100])
    path.write_bytes(content)


FILES = ["model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"]
# a flipped bit of the weights or of JSON leaves the structure whole: only the digest knows
BY_STRUCTURE = [(damage, name) for damage in (cut, empty, remove) for name in FILES] + [(flip_bits, "optimizer.pt")]
BY_MANIFEST = [(damage, name) for damage in (cut, empty, remove, flip_bits) for name in [*FILES, "rng_state.pth"]]


@pytest.mark.parametrize(
    ("keeps_manifest", "damage", "name"),
    [(True, *case) for case in BY_MANIFEST] + [(False, *case) for case in BY_STRUCTURE],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
@pytest.mark.matrix("T15")
def test_a_broken_checkpoint_is_passed_over_and_said(folder, caplog, keeps_manifest, damage, name):
    newest = folder / "checkpoint-4"
    if not keeps_manifest:
        (newest / MANIFEST).unlink()
    damage(newest / name)
    with caplog.at_level(logging.WARNING, "hf_automagic"):
        assert find_resumable_checkpoint(folder) == folder / "checkpoint-2"
    (said,) = [r.getMessage() for r in caplog.records]
    assert said.startswith("passed over checkpoint-4: ")
    assert said.endswith("; resuming from checkpoint-2")


@pytest.mark.matrix("T15")
def test_the_trainer_resumes_from_the_newest_whole_one(folder, six_steps, caplog):
    cut(folder / "checkpoint-4" / "optimizer.pt")
    with caplog.at_level(logging.WARNING, "hf_automagic"):
        assert_resumes(folder, six_steps)
    assert "passed over checkpoint-4: optimizer.pt has" in caplog.text


def test_a_broken_one_that_is_named_is_refused(folder):
    flip_bits(folder / "checkpoint-4" / "model.safetensors")
    with pytest.raises(ValueError, match=r"checkpoint-4 cannot be resumed: model.safetensors is not what was saved"):
        trainer(folder).train(resume_from_checkpoint=str(folder / "checkpoint-4"))


@pytest.mark.matrix("T15")
def test_where_none_is_whole_nothing_starts_afresh(folder):
    for number in (2, 4):
        cut(folder / f"checkpoint-{number}" / "scheduler.pt")
    with pytest.raises(ValueError, match=r"none of the 2 checkpoints .*checkpoint-4: .*checkpoint-2: .* begin anew"):
        trainer(folder).train(resume_from_checkpoint=True)


def test_without_the_optimizers_state_one_is_passed_over_unless_that_is_allowed(folder, caplog):
    for name in ("optimizer.pt", MANIFEST):
        (folder / "checkpoint-4" / name).unlink()
    resumed = trainer(folder, max_steps=6, save_strategy="no")
    with caplog.at_level(logging.WARNING, "hf_automagic"):
        resumed.train(resume_from_checkpoint=True)
    assert "checkpoint-4: it lacks optimizer.pt or scheduler.pt" in caplog.text
    caplog.clear()
    fresh = trainer(folder, max_steps=6, save_strategy="no")
    fresh.allow_fresh_optimizer = True
    with caplog.at_level(logging.WARNING, "hf_automagic"):
        fresh.train(resume_from_checkpoint=True)
    assert "checkpoint-4 lacks the optimizer's state: the optimizer starts afresh" in caplog.text
    counts = [int(inner(t).param_groups[0]["counters"]["applied"]) for t in (resumed, fresh)]
    assert counts == [6, 2]


def test_a_checkpoint_of_another_step_is_seen(folder):
    (folder / "checkpoint-4").rename(folder / "checkpoint-8")
    assert find_problems(folder / "checkpoint-8") == ["trainer_state.json is of step 4"]


@pytest.mark.matrix("T15")
def test_a_newer_manifest_is_refused(folder):
    manifest = folder / "checkpoint-4" / MANIFEST
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "schema_version": 2}))
    assert find_problems(folder / "checkpoint-4") == [
        f"{MANIFEST} has schema 2, this version reads up to 1; upgrade hf_automagic"
    ]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"files": []}', '{"schema_version": "1", "files": {}}'])
def test_an_unreadable_manifest_is_a_sentence(folder, text):
    (folder / "checkpoint-4" / MANIFEST).write_text(text)
    (problem,) = find_problems(folder / "checkpoint-4")
    assert problem.startswith(MANIFEST)


def test_a_flipped_bit_of_an_archive_is_seen_here_or_refused_by_torch_or_without_effect(folder):
    path = folder / "checkpoint-4" / "optimizer.pt"
    content = path.read_bytes()
    original = torch.load(path, weights_only=True)
    generator = random.Random(0)
    positions = [generator.randrange(len(content)) for _ in range(150)] + list(range(len(content) - 50, len(content)))
    seen = []
    for position in positions:
        changed = bytearray(content)
        changed[position] ^= 1 << generator.randrange(8)
        path.write_bytes(changed)
        if check_archive(path) is not None:
            seen.append(position)
            continue
        try:
            loaded = torch.load(path, weights_only=True)
        except RuntimeError:
            continue
        for i, state in original["state"].items():
            assert_same_bits(state, loaded["state"][i])
    assert len(seen) > 100


def test_a_save_that_breaks_leaves_no_mark_of_the_older_one(folder, monkeypatch):
    again = trainer(folder)
    plain = torch.save

    def save(obj: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        if "checkpoint-4" in str(path) and str(path).endswith("optimizer.pt"):
            raise OSError("the disk is full")
        plain(obj, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(OSError, match="the disk is full"):
        again.train()
    assert {"optimizer.pt", "model.safetensors"} <= set(os.listdir(folder / "checkpoint-4"))
    assert find_resumable_checkpoint(folder) == folder / "checkpoint-2"


# runs that were killed


def kill(*arguments: object) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests" / "kill_points.py"), *map(str, arguments)]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout.split()[-1] if run.stdout.split() else ""


def check_points(tmp_path: Path, whole: Trainer, numbers: list[int]) -> set[str]:
    kill(tmp_path, "at", *numbers)
    found = set()
    for number in numbers:
        newest = find_resumable_checkpoint(tmp_path / str(number))
        assert newest is not None
        found.add(newest.name)
        assert_resumes(tmp_path / str(number), whole)
    return found


@pytest.mark.matrix("T15")
def test_killed_in_a_save_the_older_checkpoint_is_resumed(tmp_path, six_steps):
    assert check_points(tmp_path, six_steps, [1, 9, 25]) == {"checkpoint-2"}


@pytest.mark.slow
@pytest.mark.matrix("T15")
def test_killed_at_any_write_point_of_a_save_the_newest_whole_one_is_resumed(tmp_path, six_steps):
    total = int(kill(tmp_path, "count"))
    assert total > 30
    assert check_points(tmp_path, six_steps, list(range(1, total + 1))) == {"checkpoint-2", "checkpoint-4"}


@pytest.mark.slow
@pytest.mark.matrix("T15")
def test_killed_at_random_the_newest_whole_one_is_resumed(tmp_path):
    kill(tmp_path, "random", 0, 10)
    for number in range(10):
        newest = find_resumable_checkpoint(tmp_path / str(number))
        assert newest is not None
        step = int(newest.name.rpartition("-")[2])
        whole = trainer(tmp_path / f"whole-{number}", max_steps=step + 3, save_strategy="no")
        whole.train()
        assert_resumes(tmp_path / str(number), whole)


# what somebody else put there


class Payload:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "pytorch_model.bin"])
@pytest.mark.matrix("T4")
def test_a_malicious_pickle_executes_nothing(folder, tmp_path, name):
    mark, checkpoint = tmp_path / "executed", folder / "checkpoint-4"
    if name == "pytorch_model.bin":
        (checkpoint / "model.safetensors").unlink()
    torch.save({"state": {}, "param_groups": [Payload(mark)]}, checkpoint / name)
    write_manifest(checkpoint)
    find_problems(checkpoint)
    diagnose(checkpoint)
    with pytest.raises(Exception, match=r"(?i)weights.only"):
        trainer(folder, max_steps=6).train(resume_from_checkpoint=str(checkpoint))
    assert not mark.exists()
    torch.load(checkpoint / name, weights_only=False)  # the payload works where it is let loose
    assert mark.exists()


@pytest.mark.parametrize(
    "name", ["../secret", "a/../../secret", "/etc/passwd", "..\\secret", "C:\\secret", "", "c:secret"]
)
@pytest.mark.matrix("T4")
def test_no_name_leaves_its_folder(folder, name):
    assert not stays_inside(name)
    checkpoint = folder / "checkpoint-4"
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    manifest["files"][name] = {"bytes": 1, "sha256": ""}
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))
    assert find_problems(checkpoint) == [f"{MANIFEST} names {name!r}, which lies outside of its folder"]
    (checkpoint / MANIFEST).unlink()
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    assert find_problems(checkpoint) == [
        f"model.safetensors.index.json names {name!r}, which lies outside of its folder"
    ]


def test_a_lost_shard_is_named(folder):
    checkpoint = folder / "checkpoint-4"
    (checkpoint / MANIFEST).unlink()
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": "model-2.safetensors"}}))
    assert find_problems(checkpoint) == ["model-2.safetensors is missing, and model.safetensors.index.json names it"]


# the doctor


def doctor(path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    status = cli.main(["doctor", str(path)])
    told = capsys.readouterr()
    return status, told.out + told.err


def test_the_doctor_finds_a_whole_checkpoint_well(folder, capsys):
    status, told = doctor(folder, capsys)
    assert status == 0
    for line in (
        "checkpoint-4\n",
        "complete: yes (as noted when it was saved)",
        "optimizer: hf_automagic, schema 1, 4 steps applied, 0 skipped",
        "states: 4 parameters, ",
        "softsign in blocks of 128",
        "would resume exactly: yes",
    ):
        assert line in told
    assert doctor(folder / "checkpoint-2", capsys)[0] == 0


@pytest.mark.parametrize(
    ("damage", "name", "sentence"),
    [
        (cut, "optimizer.pt", "optimizer.pt has "),
        (remove, "scheduler.pt", "it lacks optimizer.pt or scheduler.pt"),
        (remove, "rng_state.pth", "it lacks rng_state.pth"),
        (flip_bits, "model.safetensors", "model.safetensors is not what was saved"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_the_doctor_says_what_is_broken(folder, capsys, damage, name, sentence):
    damage(folder / "checkpoint-4" / name)
    status, told = doctor(folder / "checkpoint-4", capsys)
    assert status == 1
    assert "would resume exactly: no" in told
    assert sentence in told


def rewrite(checkpoint: Path, change: Any) -> None:
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    torch.save(change(state), checkpoint / "optimizer.pt")
    write_manifest(checkpoint)


def newer(state: dict[str, Any]) -> dict[str, Any]:
    state["param_groups"][0]["schema"] = 99
    return state


def hollow(state: dict[str, Any]) -> dict[str, Any]:
    return {**state, "state": {}}


def foreign(state: dict[str, Any]) -> dict[str, Any]:
    return {"state": {}, "param_groups": [{"params": [0], "lr": 0.1}]}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (newer, "its schema is 99, this version reads up to 1; upgrade hf_automagic"),
        (hollow, "optimizer.pt has counted 4 steps and holds no states"),
        (foreign, "only hf_automagic's states are known here"),
        (lambda state: [1, 2], "optimizer.pt holds no optimizer state that torch reads"),
    ],
    ids=["newer", "hollow", "foreign", "a list"],
)
def test_the_doctor_looks_into_the_optimizers_state(folder, capsys, change, sentence):
    rewrite(folder / "checkpoint-4", change)
    status, told = doctor(folder / "checkpoint-4", capsys)
    assert status == 1
    assert sentence in told


def test_the_doctor_says_that_a_16_bit_adapter_needs_our_trainer(tmp_path, capsys):
    from hf_automagic.trainer import AutomagicTrainer

    run = AutomagicTrainer(
        model=tiny_adapter(torch.bfloat16),
        args=arguments(tmp_path, optim="automagic_8bit", max_steps=1, save_strategy="steps", save_steps=1),
        train_dataset=sentences(8),
    )
    run.train()
    status, told = doctor(tmp_path, capsys)
    assert status == 0
    assert "x BF16" in told
    assert "PEFT loads it in fp32 unless AutomagicTrainer resumes it" in told


def test_the_doctor_needs_a_folder(tmp_path, capsys):
    status, told = doctor(tmp_path / "absent", capsys)
    assert status == 1
    assert "there is no folder 'absent'" in told
