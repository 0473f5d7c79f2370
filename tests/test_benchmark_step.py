"""The speed card says what its lines say, and the script that writes them runs."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LINES = ROOT / "model_cards" / "speed.jsonl"


def run_script(*arguments: str) -> None:
    script = [sys.executable, str(ROOT / "scripts" / "benchmark_step.py"), *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    subprocess.run(script, check=True, capture_output=True, env=environment)


def test_table_and_plot_come_from_the_lines_alone(tmp_path: Path):
    pytest.importorskip("matplotlib")
    shutil.copy(LINES, tmp_path)
    run_script("--redraw", "--output_dir", str(tmp_path))
    assert (tmp_path / "speed.md").read_text() == LINES.with_suffix(".md").read_text()
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_lines_name_what_they_were_measured_with():
    for line in map(json.loads, LINES.read_text().splitlines()):
        assert {"device", "torch", "commit", "steps", "set", "dtype", "row"} <= line.keys()
        assert not any("/" in value for value in line.values() if isinstance(value, str))


@pytest.mark.slow
def test_a_line_measured_again_replaces_the_older_one(tmp_path: Path):
    pytest.importorskip("matplotlib")
    for _ in range(2):
        run_script("--sets", "CPU96", "--rows", "adamw_fused", "eager", "--steps", "2", "--output_dir", str(tmp_path),
                   "--device", "cpu", "--dtypes", "fp32")  # fmt: skip
    measured = [json.loads(line) for line in (tmp_path / "speed.jsonl").read_text().splitlines()]
    assert [record["row"] for record in measured] == ["adamw_fused", "eager"]
    assert all(record["way"] < 0.1 for record in measured)
