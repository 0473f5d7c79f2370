"""What is pushed to the Hub tells of the optimizer, and of nobody's data, machine or folders."""

import getpass
import json
import os
import re
import socket
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from hf_automagic.checkpoint import MANIFEST
from hf_automagic.reporting.card import END, START
from hf_automagic.reporting.stats import FOLDER
from hf_automagic.trainer import AutomagicTrainer
from tests.test_resume import Spoils
from tests.tiny_runs import arguments, sentences, tiny_llama


@pytest.mark.matrix("T22")
def test_nothing_private_reaches_what_is_pushed(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_verysecrettoken")
    home = tmp_path / "secretproject"
    trainer = AutomagicTrainer(
        model=tiny_llama(),
        args=arguments(
            home,
            optim="automagic_coptim_8bit",
            run_name="secretrun",
            hub_token="hf_anothersecret",
            save_strategy="steps",
            save_steps=2,
        ),
        train_dataset=[{**row, "patient": "secretname"} for row in sentences(16)],
        callbacks=[Spoils()],
    )
    trainer.train()
    trainer.create_model_card()
    card = (home / "README.md").read_text()
    texts = {
        "the card": re.search(f"{START}(.*){END}", card, re.DOTALL)[1],
        "the manifest": (home / "checkpoint-4" / MANIFEST).read_text(),
        **{path.name: path.read_bytes().decode("latin-1") for path in (home / FOLDER).iterdir()},
    }
    assert {"stats.jsonl", "events.jsonl", "config.json", "learning_rates.png"} <= set(texts)
    names = {socket.gethostname(), getpass.getuser(), *(os.environ.get(name, "") for name in ("HOSTNAME", "LOGNAME"))}
    private = {str(tmp_path), str(Path.home()), os.getcwd(), "secret"} | {name for name in names if len(name) > 4}
    for name, text in texts.items():
        assert not [word for word in private if word in text], name
    assert json.loads(texts["config.json"])["training"]["seed"] == 42
