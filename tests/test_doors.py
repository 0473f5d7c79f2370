"""Claims about tools that are on git alone: what their code calls, as `scripts/check_doors.py` holds it, works."""

import ast
import dataclasses
import importlib.util
import inspect
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import hf_automagic

ROOT = Path(__file__).resolve().parents[1]


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_doors", ROOT / "scripts" / "check_doors.py")
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script
    spec.loader.exec_module(script)
    return script


script = load_script()
EVERY = pytest.mark.parametrize("door", script.DOORS, ids=lambda door: door.tool)


def stepped(**options) -> hf_automagic.Automagic:
    optimizer = hf_automagic.Automagic(
        [
            {"params": [p], "lr": 1e-4, "initial_lr": 1e-4, "name": name}
            for p, name in zip(script.lora_pair(), "ab", strict=False)
        ],
        **options,
    )
    script.step(optimizer)
    return optimizer


# the data and the script


@EVERY
def test_a_door_says_where_and_when_it_was_checked(door):
    assert re.fullmatch("[0-9a-f]{40}", door.commit)
    assert re.fullmatch(r"20\d\d-\d\d-\d\d", door.date)
    assert door.lines


def plant(door, tree: Path) -> None:
    """Writes a tree that holds what the door depends on, and nothing else."""
    for file, text in [*door.lines, *([door.edit[:2]] if door.edit else [])]:
        path = tree / file
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as out:
            out.write(f"# before\n{text}\n")


@EVERY
def test_the_script_finds_all_and_tells_what_is_missing(door, tmp_path, monkeypatch, capsys):
    tree = tmp_path / door.tool
    plant(door, tree)
    monkeypatch.setattr(script, "DOORS", (dataclasses.replace(door, trial=None),))
    assert script.main([str(tree)]) == 0
    file, text = door.lines[0]
    (tree / file).write_text("renamed")
    assert script.main([str(tree)]) == 1
    told = capsys.readouterr().out
    seen = f"last seen at {door.repository}@{door.commit[:12]} of {door.date}"
    assert f"{door.tool}: {file} lacks {text!r}; {seen}" in told


def test_the_readme_dates_every_tool():
    text = (ROOT / "README.md").read_text()
    for door in script.DOORS:
        assert f"checked at {door.commit[:7]} on {door.date}" in text, door.tool
        if door.edit:
            assert door.edit[2] in text, door.tool


# what they call


def test_kohya_builds_by_a_dotted_path_with_literal_arguments():
    options = {k: ast.literal_eval(v) for k, v in (argument.split("=") for argument in script.KOHYA_ARGS)}
    cls = hf_automagic.Automagic
    optimizer = cls([{"params": dict(enumerate(script.lora_pair())).values(), "lr": 5e-5}], lr=1e-4, **options)
    script.step(optimizer)
    assert (optimizer.param_groups[0]["max_lr"], optimizer.param_groups[0]["initial_lr"]) == (2e-3, 5e-5)
    assert not cls.__name__.lower().endswith(("8bit", "schedulefree"))  # their loader would want another package
    assert not hasattr(optimizer, "train")  # would mean schedule-free


def test_bare_matrices_step_at_the_adapters_rate():
    assert {group["role"] for group in stepped().param_groups} == {"adapter"}


def test_ai_toolkit_shows_the_mean_rate_and_resumes(tmp_path):
    optimizer = stepped()
    assert f"{optimizer.get_avg_learning_rate():.1e}" == f"{optimizer.get_learning_rates()[0]:.1e}" == "1.0e-03"
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    starts = [group["lr"] for group in optimizer.param_groups]
    resumed = stepped()
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    for group, start in zip(resumed.param_groups, starts, strict=True):
        group["lr"] = group["initial_lr"] = start
    script.step(resumed)
    script.step(optimizer)
    assert resumed.get_learning_rates() == optimizer.get_learning_rates()


def test_diffusion_pipe_stacks_the_rates_of_all_parameters():
    optimizer = stepped()
    rates = [optimizer._get_lr(group, optimizer.state[p]) for group in optimizer.param_groups for p in group["params"]]
    assert torch.stack(rates).mean().item() == pytest.approx(optimizer.get_avg_learning_rate())
    assert type(optimizer).__name__ == "Automagic"


def test_a_rate_is_known_before_the_first_step():
    optimizer = hf_automagic.Automagic(script.lora_pair(), lr=1e-4)
    assert float(optimizer._get_lr(optimizer.param_groups[0], {})) == pytest.approx(1e-3)


def test_onetrainer_reads_the_effective_rate_of_each_group():
    optimizer = stepped()
    read = [float(group.get("effective_lr", 1.0) * group.get("d", 1.0)) for group in optimizer.param_groups]
    assert read == optimizer.get_learning_rates()
    assert [group["name"] for group in optimizer.param_groups] == ["a", "b"]


def test_every_constructor_takes_params_and_a_rate_first():
    for name in (name for name in hf_automagic.__all__ if name.startswith("Automagic_")):
        names = list(inspect.signature(getattr(hf_automagic, name)).parameters)
        assert names[:2] == ["params", "lr"], name
