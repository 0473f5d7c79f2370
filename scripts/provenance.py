"""What a figure was measured with: device, versions, commit."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import torch

VERSIONS = ("torch", "transformers", "bitsandbytes", "torchao")


def provenance() -> dict[str, str]:
    """Says what the figures of this process are measured with.

    Where the tree travels without its history, the environment variable COMMIT says which it is.
    """
    versions = {name: importlib.metadata.version(name) for name in VERSIONS if find_spec(name)}
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        device = f"CPU {platform.machine()}, {torch.get_num_threads()} threads"
    return {"device": device, **versions, "commit": os.environ.get("COMMIT") or _commit() or "none"}


def _commit() -> str:
    if shutil.which("git") is None:
        return ""
    command = ["git", "rev-parse", "--short", "HEAD"]
    here = Path(__file__).resolve().parent
    return subprocess.run(command, cwd=here, capture_output=True, text=True, check=False).stdout.strip()
