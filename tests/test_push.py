"""Claims about pushes: the real client carries statistics, plots and the card's section to a hub on this machine."""

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hf_automagic.reporting.card import END, START
from tests.local_hub import LocalHub, serve_hub

pytest.importorskip("transformers")
pytest.importorskip("peft")
yaml = pytest.importorskip("yaml")

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]

# In a process of its own: the client reads its endpoint when it is imported.
TRAIN = """
import sys, warnings
warnings.simplefilter("ignore")
from transformers import Trainer
from hf_automagic.callbacks import attach
from hf_automagic.trainer import AutomagicTrainer
from tests.tiny_runs import arguments, sentences, tiny_adapter, tiny_llama

def push(name, cls, model, strategy):
    args = arguments(
        f"{sys.argv[1]}/{name}", optim="automagic_8bit", push_to_hub=True, hub_model_id=f"tester/{name}",
        hub_strategy=strategy, hub_always_push=True, hub_token="hf_secret", save_strategy="steps", save_steps=2,
    )
    trainer = cls(model=model, args=args, train_dataset=sentences(16))
    if cls is Trainer:
        attach(trainer)
    trainer.train()
    if strategy == "end":
        trainer.train()
        trainer.push_to_hub()
        trainer.push_to_hub()

push("plain-end", AutomagicTrainer, tiny_llama(), "end")
push("peft-end", AutomagicTrainer, tiny_adapter(), "end")
push("stock-end", Trainer, tiny_llama(), "end")
push("plain-every_save", AutomagicTrainer, tiny_llama(), "every_save")
push("peft-checkpoint", AutomagicTrainer, tiny_adapter(), "checkpoint")
push("stock-all_checkpoints", Trainer, tiny_llama(), "all_checkpoints")
"""
SFT = """
import sys, warnings
warnings.simplefilter("ignore")
from datasets import Dataset
from trl import SFTConfig, SFTTrainer
from hf_automagic.callbacks import attach
from hf_automagic.trainer import AutomagicTrainerMixin
from tests.tiny_runs import argument_values, tiny_adapter, tiny_tokenizer

class Ours(AutomagicTrainerMixin, SFTTrainer):
    pass

for name, cls in (("sft-ours", Ours), ("sft-stock", SFTTrainer)):
    values = argument_values(f"{sys.argv[1]}/{name}", optim="automagic_8bit", push_to_hub=True, save_steps=2)
    values |= {"hub_model_id": f"tester/{name}", "save_strategy": "steps", "hub_always_push": True}
    data = Dataset.from_list([{"text": "w3 w4 w5 w6"}] * 16)
    args = SFTConfig(**values, bf16=False, gradient_checkpointing=False)
    trainer = cls(tiny_adapter(), args, train_dataset=data, processing_class=tiny_tokenizer())
    if cls is SFTTrainer:
        attach(trainer)
    trainer.train()
    trainer.train()
    trainer.push_to_hub()
"""


def run(code: str, folder: Path, hub: LocalHub) -> None:
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HOME": str(folder / "home"),
        "OMP_NUM_THREADS": "1",
        "NO_PROXY": "127.0.0.1",
    }
    command = [sys.executable, "-c", code, str(folder)]
    run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHub]:
    """A hub to which six runs have pushed."""
    with serve_hub() as hub:
        run(TRAIN, tmp_path_factory.mktemp("private_place"), hub)
        yield hub


FINISHED = ["plain-end", "peft-end", "stock-end"]
IN_PROGRESS = ["plain-every_save", "peft-checkpoint", "stock-all_checkpoints"]
STATISTICS = {
    f"optimizer_stats/{name}"
    for name in ("stats.jsonl", "config.json", "learning_rates.png", "learning_rates_dark.png", "memory.png")
}


def card(files: dict[str, bytes]) -> tuple[dict[str, Any], str]:
    text = files["README.md"].decode()
    return yaml.safe_load(text.split("---\n")[1]), text


def assert_card_is_ours(files: dict[str, bytes]) -> None:
    metadata, text = card(files)
    assert text.count(START) == text.count(END) == 1
    assert "## Optimizer: automagic_8bit" in text
    assert {"hf_automagic", "optimizer:automagic_8bit"} <= set(metadata["tags"])
    assert "Use OptimizerNames" not in text
    images = {line.partition("(./")[2].rstrip(")") for line in text.splitlines() if line.startswith("![")}
    assert images
    assert images <= files.keys()


@pytest.mark.parametrize("name", FINISHED)
def test_a_push_after_two_trainings_carries_one_section_and_the_statistics(hub: LocalHub, name: str):
    files = hub.repos[f"tester/{name}"]
    assert files.keys() >= STATISTICS
    assert_card_is_ours(files)
    steps = [json.loads(line)["step"] for line in files["optimizer_stats/stats.jsonl"].splitlines()]
    assert steps == [1, 2, 3, 4]


@pytest.mark.parametrize(("name", "library"), [("plain-end", "transformers"), ("peft-end", "peft")])
def test_the_library_stays_the_trainers(hub: LocalHub, name: str, library: str):
    assert card(hub.repos[f"tester/{name}"])[0]["library_name"] == library


@pytest.mark.parametrize("name", IN_PROGRESS)
def test_each_push_of_a_checkpoint_carries_what_there_is_by_then(hub: LocalHub, name: str):
    pushed = [files for files in hub.commits[f"tester/{name}"] if "README.md" in files]
    for files in pushed:
        assert files.keys() >= STATISTICS
        assert_card_is_ours(files)
    rows = [len(files["optimizer_stats/stats.jsonl"].splitlines()) for files in pushed]
    assert rows[0] in (2, 4)  # the client reads the files in a thread of its own, while training goes on
    assert rows[-1] == 4
    folders = {path.partition("/")[0] for path in pushed[-1] if "checkpoint" in path}
    expected = {
        "every_save": set(),
        "checkpoint": {"last-checkpoint"},
        "all_checkpoints": {"checkpoint-2", "checkpoint-4"},
    }
    assert folders == expected[name.partition("-")[2]]


def test_metadata_passed_the_hubs_own_check(hub: LocalHub):
    assert len(hub.metadata) >= len(FINISHED + IN_PROGRESS)
    assert all(isinstance(metadata, dict) for metadata in hub.metadata)


def test_nothing_private_is_in_what_we_write(hub: LocalHub):
    private = [str(ROOT), str(Path.home()), "private_place", "hf_secret", "127.0.0.1"]
    host = re.compile(rf"\b{re.escape(socket.gethostname())}\b")
    for files in hub.repos.values():
        ours = {path: content for path, content in files.items() if path.startswith("optimizer_stats/")}
        for path, content in {**ours, "README.md": files["README.md"]}.items():
            assert not [word for word in private if word.encode() in content], path
            assert path.endswith(".png") or not host.search(content.decode()), path
        assert not [path for path in files if path.startswith("_") or "/_" in path]


def test_files_are_read_back_with_the_client(hub: LocalHub, tmp_path: Path):
    code = (
        "import sys; from huggingface_hub import hf_hub_download, ModelCard\n"
        "path = hf_hub_download('tester/plain-end', 'optimizer_stats/config.json', cache_dir=sys.argv[1])\n"
        "assert 'automagic_8bit' in open(path).read()\n"
        "assert ModelCard.load('tester/plain-end').data.library_name == 'transformers'\n"
    )
    run(code, tmp_path, hub)


def test_trls_cards_carry_one_section_after_two_trainings(tmp_path: Path):
    pytest.importorskip("trl")
    with serve_hub() as hub:
        run(SFT, tmp_path, hub)
        for name in ("sft-ours", "sft-stock"):
            files = hub.repos[f"tester/{name}"]  # earlier pushes may have read the card while TRL wrote it anew
            assert files.keys() >= STATISTICS
            assert_card_is_ours(files)
            metadata, _ = card(files)
            assert metadata["library_name"] in ("peft", "transformers")  # whichever TRL chose
            assert "trl" in metadata["tags"]
