"""Claims about `hf-automagic`: help is cheap, plots are redrawn from a run's files, mistakes are answered."""

import subprocess
import sys
from pathlib import Path

import pytest

from hf_automagic.cli import main
from hf_automagic.reporting.stats import StatsWriter


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The output folder of a run of three logs."""
    writer = StatsWriter(tmp_path)
    writer.start(0)
    for step in (10, 20, 30):
        writer.append_row(step, {"optim/lr_A": 1e-4, "learning_rate": 5e-5})
    return tmp_path


@pytest.mark.parametrize("folder", [".", "optimizer_stats"])
def test_plots_are_redrawn_from_the_files(run: Path, folder: str, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("matplotlib")
    assert main(["plot", str(run / folder)]) == 0
    drawn = run / "optimizer_stats" / "learning_rates.png"
    assert capsys.readouterr().out == f"{drawn}\n"
    assert drawn.read_bytes().startswith(b"\x89PNG")


def test_a_folder_without_a_run_is_answered_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["plot", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"hf-automagic: {tmp_path.name!r} holds neither stats.jsonl nor config.json")
    assert error.count("\n") == 1


def test_help_imports_nothing_slow_and_no_colour():
    code = (
        "import sys\nfrom hf_automagic.cli import main\n"
        "for command in ([], ['list'], ['plot'], ['estimate']):\n"
        "    try: main([*command, '--help'])\n"
        "    except SystemExit as done: assert done.code == 0\n"
        "print([n for n in ('transformers', 'matplotlib', 'peft', 'accelerate', 'bitsandbytes') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *help_texts, imported = done.stdout.splitlines()
    assert imported == "[]"
    assert "\x1b" not in done.stdout
    assert sum(line.startswith("usage: hf-automagic") for line in help_texts) == 4
