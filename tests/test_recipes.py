"""Claims about scripts/recipes: each runs as it stands, in its small form, and its loss falls."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

RECIPES = Path(__file__).resolve().parents[1] / "scripts" / "recipes"
HELPERS = {"common.py", "tiny_files.py", "sft_lora.yaml"}
TWICE = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
LAUNCHERS = {"two_processes.py": [sys.executable, *TWICE], "sft_lora.sh": ["bash"]}
LAST_LINES = {
    "plain_loop.py": "plain loop: loss",
    "full_bf16.py": "bytes of state a weight",
    "dora.py": "DoRA: loss",
    "conv_lora.py": "context: consistency",
    "qlora.py": "QLoRA: loss",
    "two_processes.py": "2 processes: loss",
    "sft_lora.sh": "'train_loss'",
}


def run_recipe(name: str, folder: Path, *arguments: str) -> str:
    env = {
        **os.environ,
        "PYTHONPATH": str(RECIPES.parents[1]),
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", ""),
    }
    command = [*LAUNCHERS.get(name, [sys.executable, "-W", "ignore"]), str(RECIPES / name), *arguments]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_every_recipe_is_run():
    assert {path.name for path in RECIPES.iterdir() if path.is_file()} == HELPERS | LAST_LINES.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(LAST_LINES))
def test_a_recipe_learns(name, tmp_path):
    if name == "qlora.py":
        pytest.importorskip("bitsandbytes")
    if name == "sft_lora.sh":
        pytest.importorskip("trl")
    arguments = ["--use_cpu"] if name == "sft_lora.sh" else []
    assert LAST_LINES[name] in run_recipe(name, tmp_path, *arguments)
