"""Code in fresh interpreters, for what changes or watches a whole process: the enum, the import system, a tool."""

import json
import os
import subprocess
import sys
from pathlib import Path

import hf_automagic

ROOT = str(Path(hf_automagic.__file__).parent.parent)


def run_python(code: str, *argv: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh interpreter that finds this package."""
    path = os.pathsep.join(filter(None, [ROOT, os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, argv)]
    return subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=300)


def report(code: str, *argv: object, cwd: Path | None = None) -> dict:
    """Runs code that assigns a dict `seen`, and returns it."""
    done = run_python(f"import json, sys\nseen = {{}}\n{code}\nprint('SEEN' + json.dumps(seen))", *argv, cwd=cwd)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.rpartition("SEEN")[2])
