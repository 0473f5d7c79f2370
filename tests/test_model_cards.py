"""Claims about model_cards/: a card for each registered optimizer, made of nothing but the measured lines."""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from hf_automagic import get_optimizer_info, list_optimizers

ROOT = Path(__file__).resolve().parents[1]
CARDS = ROOT / "model_cards"
MACHINE = {"device": "a GPU", "torch": "2.11.0", "commit": "abc1234"}


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("model_cards", ROOT / "scripts" / "model_cards.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def written(folder: Path, stem: str, *records: dict[str, Any]) -> Path:
    (folder / f"{stem}.jsonl").write_text("".join(f"{json.dumps({**r, **MACHINE})}\n" for r in records))
    return folder


def test_every_optimizer_has_the_card_that_its_lines_make(script: Any):
    cards = script.render(CARDS)
    assert cards.keys() == set(list_optimizers())
    for name, card in cards.items():
        assert (CARDS / f"{name}.md").read_text() == card, "run python scripts/model_cards.py"


def test_the_script_writes_what_is_committed(script: Any, tmp_path: Path):
    for path in CARDS.glob("*.jsonl"):
        shutil.copy(path, tmp_path)
    script.main(["--lines", str(tmp_path), "--cards", str(tmp_path)])
    assert (tmp_path / "automagic_8bit.md").read_bytes() == (CARDS / "automagic_8bit.md").read_bytes()


def test_a_card_says_what_its_record_says(script: Any, tmp_path: Path):
    card = script.render(tmp_path)["automagic_coptim_8bit"]
    info = get_optimizer_info("automagic_coptim_8bit")
    assert card.startswith(f"# automagic_coptim_8bit\n\n{info.description}\n")
    assert "`momentum_scales=1:5:10:25`" in card
    assert all(f"https://arxiv.org/abs/{paper}" in card for paper in info.papers)
    assert "Nothing was measured by this name yet." in card
    assert "$" not in card


def test_a_new_file_adds_its_section_to_the_optimizers_that_it_names(script: Any, tmp_path: Path):
    cards = script.render(written(tmp_path, "new_claim", {"optim": "came", "gain": 0.123456, "seed": 3}))
    assert "## New claim\n" in cards["came"]
    assert "| 0.1235 | 3 | a GPU, torch 2.11.0, commit abc1234 |" in cards["came"]
    assert all("## New claim" not in card for name, card in cards.items() if name != "came")


def test_a_step_is_timed_beside_its_anchors(script: Any, tmp_path: Path):
    where = {"set": "LORA", "dtype": "float32"}
    rows = [("automagic_8bit, triton", 0.9), ("torch AdamW fused", 2.5), ("came-pytorch", 226.0)]
    records = [{**where, "label": label, "wall_ms": wall} for label, wall in rows]
    cards = script.render(written(tmp_path, "speed", *records))
    section = cards["automagic_8bit"].partition("## How long a step takes")[2]
    assert "| automagic_8bit, triton | 0.9 |" in section
    assert "| torch AdamW fused | 2.5 |" in section
    assert "came-pytorch" not in section
    assert "## How long" not in cards["came"]


def test_starts_are_compared_with_adamws_best_rate(script: Any, tmp_path: Path):
    cells = [("AdamW", 1e-3, 0.5), ("AdamW", 1e-1, 2.0), ("automagic_8bit", 1e-6, 0.6), ("automagic_8bit", 1e-2, 0.4)]
    records = [
        {"task": "movies", "horizon": 300, "arm": arm, "lr": lr, "seed": seed, "loss": loss + seed / 10 - 0.05}
        for arm, lr, loss in cells
        for seed in (0, 1)
    ]
    card = script.render(written(tmp_path, "selftuning", *records))["automagic_8bit"]
    assert "| movies | 300 | 1e-06 to 0.01 | 0.5000 | 0.4000 | 0.6000 | 1e-06 | +20.0% |" in card


def test_a_losing_row_of_memory_is_printed_too(script: Any, tmp_path: Path):
    line = {"optim": "automagic_8bit", "name": "run", "state": 2**20, "promised": 2**30, "measured": 2**31}
    card = script.render(written(tmp_path, "memory", line))["automagic_8bit"]
    assert "| run | 1 MiB | 1,024 MiB | 2,048 MiB | -50.0% |" in card
