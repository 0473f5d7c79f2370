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


def test_the_median_process_of_a_row_counts(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from benchmark_step import typical

    runs = [{"wall_ms": wall, "gpu_ms": gpu} for wall, gpu in ((3.0, 0.3), (1.0, 0.1), (2.0, 0.2))]
    assert typical(runs) == {"wall_ms": 2.0, "gpu_ms": 0.2, "wall_span_ms": [1.0, 3.0], "processes": 3}
    assert typical(runs[:2]) == {"wall_ms": 1.0, "gpu_ms": 0.1, "wall_span_ms": [1.0, 3.0], "processes": 2}
    assert typical(runs[:1]) == runs[0]


@pytest.mark.slow
def test_a_line_measured_again_replaces_the_older_one(tmp_path: Path):
    pytest.importorskip("matplotlib")
    for _ in range(2):
        what = "--sets CPU96 --rows adamw_fused eager --steps 2 --device cpu --dtypes fp32 --processes 2"
        run_script(*what.split(), "--output_dir", str(tmp_path))
    measured = [json.loads(line) for line in (tmp_path / "speed.jsonl").read_text().splitlines()]
    assert [record["row"] for record in measured] == ["adamw_fused", "eager"]
    assert all(record["way"] < 0.1 for record in measured)
