"""The self-tuning card says what its lines say; runs are paired, go on where they were cut, and are counted fairly."""

import dataclasses
import importlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
LINES = ROOT / "model_cards" / "selftuning.jsonl"
ORIGIN = {"device": "a CPU", "torch": "2.13.0", "transformers": "5.0", "commit": "abc1234"}


@pytest.fixture
def part(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a part of the benchmark by name."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return lambda name: importlib.import_module(f"selftuning.{name}")


def line(arm: str, loss: float, lr: float = 5e-5, task: str = "movie-lora", seed: int = 0, horizon: int = 300) -> dict:
    key = f"{task}|{arm}|{lr:g}|{seed}|{horizon}"
    job = {"task": task, "arm": arm, "lr": lr, "seed": seed, "horizon": horizon, "key": key}
    return {**job, "loss": loss, "accuracy": 0.5, "seconds": 1.0, **ORIGIN}


# the page


def test_page_and_plot_come_from_the_lines_alone(part: Any, tmp_path: Path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("scipy")
    shutil.copy(LINES, tmp_path)
    told = part("report").write_report(tmp_path / LINES.name)
    assert (tmp_path / "selftuning.md").read_bytes() == LINES.with_suffix(".md").read_bytes(), "run the report again"
    assert (tmp_path / "selftuning.png").read_bytes().startswith(b"\x89PNG")
    assert told.startswith(f"{len(LINES.read_text().splitlines())} runs")


def test_lines_are_published_in_order_without_their_curves(part: Any, tmp_path: Path):
    runs, results = tmp_path / "runs.jsonl", tmp_path / "results.jsonl"
    for arm, loss in (("search", 0.5), ("AdamW", 0.7), ("AdamW", 0.6)):
        part("lines").append_line(runs, {**line(arm, loss), "curve": [1.0], "rates": [1e-4]})
    assert part("lines").publish([runs], results) == 2
    assert part("lines").publish([runs], results) == 0
    assert [json.loads(text) for text in results.read_text().splitlines()] == [line("AdamW", 0.6), line("search", 0.5)]
    assert "".join(f"{json.dumps(row)}\n" for row in part("lines").read_lines(LINES)) == LINES.read_text()


def test_a_page_tells_of_losses_gaps_and_arms_that_are_new(part: Any):
    pytest.importorskip("scipy")
    rows = [
        line("AdamW", 0.5, 1e-3),
        line("AdamW", 2.0, 1e-1),
        line("automagic_8bit", 0.6),
        line("Prodigy", 0.4, 1e-3),
    ]
    rows += [line("search", math.nan), line("rails x3", 0.3), line("AdamW", 1.0, 1e-3, task="a new task")]
    page = "\n".join(part("report").render(rows))
    assert "- movie-lora, search, 5e-05, 0, 300\n" in page
    assert "| movie-lora | 300 | 1e-3* | 0.5000 | **1.200** (1.200 to 1.200) | **4.000** (4.000 to 4.000) |" in page
    assert "| search | 0 of 1 | 0 of 1 | 0 of 1 | movie-lora, 300 steps: 4.000 | 0 of 0 | 1 | no |" in page
    assert "| rails x3 | ours with every rail at 3 | -50.0% |" in page
    assert "| 1e-3 | movie-lora, 300: 0.800 |" in page
    assert "- `a new task`: not described\n" in page


@pytest.mark.parametrize(("commit", "told"), [("HEAD", []), ("0" * 40, ["is not in this history"])])
def test_lines_of_another_code_are_called_stale(part: Any, commit: str, told: list[str], monkeypatch: Any):
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs the history")
    monkeypatch.setattr(part("report"), "DECIDING", ("LICENSE",))
    found = list(part("report").stale([{"commit": commit}]))
    assert [sentence.rpartition("which ")[2] for sentence in found] == told


# the numbers


def test_a_ratio_is_to_the_best_adamw_of_the_same_seed(part: Any):
    losses = {("AdamW", 1e-3): (0.4, 0.9), ("AdamW", 1e-2): (0.5, 0.8), ("automagic_8bit", 5e-5): (0.6, 0.4)}
    rows = [line(arm, loss, lr, seed=seed) for (arm, lr), both in losses.items() for seed, loss in enumerate(both)]
    results = part("measures").Results(rows)
    assert results.ratios(("movie-lora", 300), "automagic_8bit") == pytest.approx([1.5, 0.5])
    assert results.best(("movie-lora", 300, 1)) == (1e-2, 0.8)
    assert results.starts(("movie-lora", 300, 0), "AdamW") == {1e-3: 1.0, 1e-2: 1.25}


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_the_worst_of_its_cell(part: Any, loss: float):
    rows = [line("AdamW", 0.5), line("AdamW", 4.0, 1e-1), line("automagic_8bit", loss)]
    assert part("measures").Results(rows).ratios(("movie-lora", 300), "automagic_8bit") == [8.0]
    assert part("measures").diverged(rows) == rows[2:]
    assert part("measures").Results(rows[2:]).cells() == []


WIDTHS = {
    "everywhere": ({1e-6: 1.0, 1e-4: 1.02, 1e-1: 0.9}, 5.0),
    "nowhere": ({1e-6: 1.1, 1e-1: 2.0}, 0.0),
    "one rate": ({1e-3: 1.0}, 0.0),
    "half of a decade on each side": ({1e-4: 1.05**2, 1e-3: 1.0, 1e-2: 1.05**2}, 1.0),
    "two islands": ({1e-6: 1.0, 1e-5: 1.0, 1e-4: 9e9, 1e-3: 9e9, 1e-2: 1.05, 1e-1: 1.0}, 2.0),
}


@pytest.mark.parametrize("name", WIDTHS)
def test_a_width_counts_the_decades_within_five_percent(part: Any, name: str):
    ratios, width = WIDTHS[name]
    assert part("measures").decades_within(ratios) == pytest.approx(width, abs=0.01)


PAIRS = {  # differences, whether the interval leaves zero out, whether they are equal within 1%
    "worse": ([0.05, 0.06, 0.04, 0.05, 0.07], True, False),
    "equal": ([0.001, -0.001, 0.002, -0.002, 0.0005], False, True),
    "unclear": ([0.2, -0.2, 0.1, -0.15, 0.02], False, False),
    "the same number": ([0.001, 0.001, 0.001], True, True),
}


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_are_told_apart_or_equal(part: Any, name: str):
    pytest.importorskip("scipy")
    values, differ, equal = PAIRS[name]
    found = part("measures").compare(values)
    assert found.low <= found.mean <= found.high
    assert found.mean == pytest.approx(sum(values) / len(values))
    assert (found.low > 0 or found.high < 0) == differ
    assert (found.p_equal < 0.05) == equal
    assert found == part("measures").compare(values)


def test_one_pair_says_nothing(part: Any):
    pytest.importorskip("scipy")
    assert part("measures").compare([0.1]) is None


VERDICTS = [(-0.02, 0.0, True), (-0.02, 0.03, False), (0.02, 0.0, False), (0.0, 0.0, False)]


@pytest.mark.parametrize(("mean", "worst_cell", "beats"), VERDICTS)
def test_the_controller_must_be_better_and_nowhere_worse(part: Any, mean: float, worst_cell: float, beats: bool):
    pairs = part("measures").Paired(9, mean, mean - 0.01, mean + 0.01, 0.5)
    said = part("versus").verdict(pairs, {("movie-lora", 300): worst_cell})
    assert ("beats the null arm" in said) == beats
    assert ("(movie-lora at 300)" in said) == (worst_cell > 0)


# the runs


def test_a_line_that_was_cut_is_left_out_and_spoils_no_other(part: Any, tmp_path: Path):
    path, rows = tmp_path / "runs.jsonl", [line("AdamW", 0.5), line("search", 0.4), line("CAME", 0.3)]
    part("lines").end_last_line(path)
    assert part("lines").read_lines(path) == []
    for row in rows[:2]:
        part("lines").append_line(path, row)
    path.write_text(path.read_text()[:-30])
    assert part("lines").read_lines(path) == rows[:1]
    part("lines").end_last_line(path)
    part("lines").append_line(path, rows[2])
    assert part("lines").read_lines(path) == [rows[0], rows[2]]


def test_two_arms_see_the_same_batches_and_start_from_the_same_weights(part: Any, tmp_path: Path):
    pytest.importorskip("sklearn")
    job = part("training").Job("conv-scratch", "AdamW", 1e-3, seed=3, horizon=4)
    jobs = (job, dataclasses.replace(job, arm="automagic_8bit"), dataclasses.replace(job, seed=4))
    runs = [part("training").Run(job, tmp_path, torch.device("cpu")) for job in jobs]
    seen: list[list[torch.Tensor]] = []
    for run in runs:
        seen.append([])
        run.model.register_forward_pre_hook(lambda model, inputs, seen=seen[-1]: seen.append(inputs[0]))
        run.advance()
    one, two, other = (torch.stack(batches) for batches in seen)
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert len(one) == 4
    assert runs[0].losses[0] == runs[1].losses[0]
    assert runs[0].losses[1] != runs[1].losses[1]


@pytest.mark.slow
def test_a_grid_goes_on_where_it_was_cut(part: Any, tmp_path: Path):
    pytest.importorskip("sklearn")
    results = tmp_path / "runs.jsonl"
    jobs = [dataclasses.replace(job, horizon=2) for job in part("grid").stage("small")]

    def run() -> int:
        return part("grid").run_grid(jobs, tmp_path, results, processes=1, slots=1, seconds=300, origin=ORIGIN)

    assert run() == len(jobs)
    whole = results.read_text()
    assert run() == 0
    assert results.read_text() == whole
    results.write_text(whole[:-40])
    assert len(part("lines").read_lines(results)) == len(jobs) - 1
    assert run() == 1
    assert {found["key"] for found in part("lines").read_lines(results)} == {job.key for job in jobs}
