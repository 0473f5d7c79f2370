"""The kernels under NVIDIA's compute-sanitizer: nothing outside a tensor is touched, no thread races another."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.sanitized_steps import CASES

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="needs compute-sanitizer, of the CUDA toolkit")
@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda i: f"{CASES[i][0]} {CASES[i][1]}")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_the_sanitizer_finds_nothing(tool: str, case: int):
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, "-m"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [*command, "tests.sanitized_steps", str(case)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "0 errors" in done.stdout or "0 hazards" in done.stdout, done.stdout[-1000:]
