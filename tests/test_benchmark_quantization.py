"""The quantisation card says what its lines say, the lines meet the goals, and the script that wrote them runs."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
LINES = ROOT / "model_cards" / "quantization.jsonl"
RECORDS: list[dict[str, Any]] = [json.loads(line) for line in LINES.read_text().splitlines()]
RECORDED = "MiniLM LoRA on movie sentences"


def run_script(*arguments: str) -> None:
    # a process of its own: the script registers codecs of others
    script = [sys.executable, str(ROOT / "scripts" / "benchmark_quantization.py"), *arguments]
    subprocess.run(script, check=True, capture_output=True, env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})


def record(label: str, source: str = RECORDED) -> dict[str, Any]:
    return next(r for r in RECORDS if (r["label"], r["source"]) == (label, source))


def test_table_and_plot_come_from_the_lines_alone(tmp_path: Path):
    pytest.importorskip("matplotlib")
    shutil.copy(LINES, tmp_path)
    run_script("--redraw", "--output_dir", str(tmp_path))
    assert (tmp_path / "quantization.md").read_text() == LINES.with_suffix(".md").read_text()
    assert (tmp_path / "quantization.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_script_measures(tmp_path: Path):
    pytest.importorskip("matplotlib")
    run_script("--sources", "noise", "--steps", "2", "--output_dir", str(tmp_path))
    measured = [json.loads(line) for line in (tmp_path / "quantization.jsonl").read_text().splitlines()]
    assert measured[0].keys() <= RECORDS[0].keys() | {"torchao"}
    assert {r["label"] for r in measured} >= {r["label"] for r in RECORDS} - {"torchao 256"}


def test_recorded_momenta_meet_the_goal_in_one_run():
    ours, theirs = record("softsign 128"), record("bitsandbytes dynamic 256")
    assert ours["relative_l2"] <= 0.7
    assert ours["bytes"] <= theirs["bytes"]
    assert ours["relative_l2"] <= 0.6 * theirs["relative_l2"]


def test_lines_name_what_they_were_measured_with():
    for line in RECORDS:
        assert {"device", "torch", "bitsandbytes", "commit", "steps", "elements"} <= line.keys()
        assert not any("/" in value for value in line.values() if isinstance(value, str))
