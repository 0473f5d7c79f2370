"""README's blocks run as they stand; only models, data and transformers' own names are supplied."""

import re
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainingArguments

import hf_automagic
from tests.tiny_runs import sentences, tiny_adapter

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.S)


def supplied() -> dict:
    rows = sentences(16)
    batch = {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}
    return {
        "model": tiny_adapter(),
        "dataset": rows,
        "dataloader": [batch] * 3,
        "Trainer": Trainer,
        "TrainingArguments": TrainingArguments,
    }


@pytest.mark.parametrize("block", BLOCKS, ids=[block.strip().splitlines()[0] for block in BLOCKS])
def test_a_block_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), supplied())


def test_there_are_blocks():
    assert len(BLOCKS) >= 4


def test_readme_names_what_exists():
    for name in re.findall(r"`((?:automagic|came)\w*)`", README):
        assert name in hf_automagic.list_optimizers(), name
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"`((?:scripts|tests)/[\w./]+)`", README):
        assert (ROOT / path).exists(), path
