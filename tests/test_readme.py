"""Every snippet of every document runs, or is held to what exists; models and data are supplied."""

import ast
import importlib.util
import json
import re
import shlex
import statistics
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from transformers import Trainer, TrainingArguments

import hf_automagic
from hf_automagic import cli
from hf_automagic.factory import parse_options
from tests.tiny_runs import sentences, tiny_llama

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ["README.md", ".github/README.zh-TW.md", ".github/CONTRIBUTING.md", ".github/SECURITY.md"]
README = (ROOT / "README.md").read_text()


def blocks(document: str, *languages: str) -> list[str]:
    found = re.findall(r"^```(\w+)\n(.*?)^```", (ROOT / document).read_text(), flags=re.S | re.M)
    return [text for language, text in found if language in languages or not languages]


def every(*languages: str) -> list:
    """The different blocks of a language in all documents, each once."""
    found = {text: document for document in reversed(DOCUMENTS) for text in blocks(document, *languages)}
    return [pytest.param(text, id=f"{document}: {text.strip().splitlines()[0]}") for text, document in found.items()]


def supplied() -> dict:
    rows = sentences(16)
    batch = {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}
    return {
        "model": tiny_llama(),
        "dataset": rows,
        "dataloader": [batch] * 3,
        "Trainer": Trainer,
        "TrainingArguments": TrainingArguments,
    }


@pytest.fixture
def _as_before() -> Iterator[None]:
    """Takes out what a snippet registers."""
    before = hf_automagic.list_optimizers()
    yield
    added = set(hf_automagic.list_optimizers()) - set(before)
    if added:
        hf_automagic.unregister()
        for name in added:
            hf_automagic.unregister_optimizer(name)
        hf_automagic.register()


@pytest.mark.usefixtures("_as_before")
@pytest.mark.parametrize("block", every("python"))
def test_a_block_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), supplied())


# commands and files


def commands() -> list:
    lines = [line for block in every("bash") for line in block.values[0].splitlines() if line.split("#")[0].strip()]
    return [shlex.split(line, comments=True) for line in dict.fromkeys(lines)]


def value_after(words: list[str], option: str) -> str | None:
    return words[words.index(option) + 1] if option in words else None


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_a_command_names_what_exists(words):
    for option in ("--optim", "--optimizer"):
        assert value_after(words, option) in {None, *hf_automagic.list_optimizers()}
    parse_options(value_after(words, "--optim_args"))
    for word in words:
        if word.startswith(("scripts/", "tests/")):
            assert (ROOT / word).exists(), word
        for module in re.findall(r"\bhf_automagic(?:\.[a-z]\w*)+", word):
            assert importlib.util.find_spec(module), module
    if path := value_after(words, "--optimizer_type"):
        arguments = words[words.index("--optimizer_args") + 1 :]
        options = {k: ast.literal_eval(v) for k, v in (argument.split("=") for argument in arguments)}
        getattr(hf_automagic, path.removeprefix("hf_automagic."))([torch.nn.Parameter(torch.ones(4, 4))], **options)
    if words[:2] == ["pip", "install"]:
        extras = re.findall(r"\[(\w+)\]", words[2])
        assert all(f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text() for extra in extras)


def test_the_command_of_the_text_works(capsys):
    assert cli.main(["list"]) == 0
    assert "automagic_8bit" in capsys.readouterr().out


@pytest.mark.parametrize("block", every("yaml"))
def test_a_file_for_a_tool_says_what_we_know(block):
    content = yaml.safe_load(block)
    assert (content.get("optim") or content.get("optimizer")) in hf_automagic.list_optimizers()
    assert parse_options(content["optim_args"])
    for plugin in content.get("plugins", []):
        module, _, name = plugin.rpartition(".")
        tree = ast.parse(Path(importlib.util.find_spec(module).origin).read_text())
        assert name in {node.name for node in tree.body if isinstance(node, ast.ClassDef)}


def test_every_block_has_a_language_that_is_checked():
    languages = {language for document in DOCUMENTS for language in fences(document)}
    assert languages == {"python", "bash", "yaml", "text", "bibtex"}


def fences(document: str) -> list[str]:
    return re.findall(r"^```(\w*)$", (ROOT / document).read_text(), flags=re.M)[::2]


# the texts


def test_the_chinese_page_has_the_blocks_of_the_readme_in_their_order():
    english, chinese = blocks("README.md"), blocks(".github/README.zh-TW.md")
    assert [block for block in english if block in chinese] == chinese
    assert set(blocks("README.md", "python", "yaml")) <= set(chinese)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_a_document_names_what_exists(document):
    text = (ROOT / document).read_text()
    for name in re.findall(r"`((?:automagic|came)\w*)`", text):
        assert name in hf_automagic.list_optimizers(), name
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (ROOT / document).parent.joinpath(path).exists(), path
    for path in re.findall(r"`((?:scripts|tests)/[\w./]+)", text):
        assert (ROOT / path).exists(), path
    for name in re.findall(r"`preset=(\w+)`", text):
        parse_options(f"preset={name}")


def test_the_logged_keys_of_the_readme_exist():
    source = "".join(path.read_text() for path in (ROOT / "hf_automagic" / "reporting").glob("*.py"))
    for name in set(re.findall(r"`optim/(\w+)`", README)) - {"lr_A", "lr_B"}:
        assert f'"{name}"' in source, name


def test_the_readme_quotes_the_benchmark_of_rates():
    runs = [json.loads(line) for line in (ROOT / "model_cards" / "selftuning.jsonl").read_text().splitlines()]
    losses = {(run["task"], run["horizon"], run["seed"], run["arm"], run["lr"]): run["loss"] for run in runs}
    ratios = defaultdict(list)
    for (task, horizon, seed, arm, lr), loss in losses.items():
        if (arm, lr) == ("automagic_8bit", 5e-5):
            rivals = [x for key, x in losses.items() if key[:4] == (task, horizon, seed, "AdamW")]
            ratios[task, horizon].append(loss / min(rivals))
    close = sum(statistics.mean(cell) <= 1.05 for cell in ratios.values())
    tasks = len({task for task, _ in ratios})
    assert f"nothing set, {len(ratios)} cells ({tasks} tasks, 100 to 1,000 steps)" in README
    assert f"within 5% in {close};" in README


def test_the_readme_quotes_the_benchmark_of_steps():
    runs = [json.loads(line) for line in (ROOT / "model_cards" / "speed.jsonl").read_text().splitlines()]
    known = {(run["set"], run["dtype"], run["row"]): run for run in runs}
    ours, torchs = (known["LORA", "bf16", row] for row in ("triton", "adamw_fused"))
    full = [known["FULL1B", "bf16", row]["wall_ms"] for row in ("triton", "adamw_fused")]
    assert f"bf16, one H100: {ours['wall_ms']:.2f} ms, of them {ours['gpu_ms']:.2f} on the GPU;" in README
    assert f"torch's fused AdamW {torchs['wall_ms']:.2f} and {torchs['gpu_ms']:.2f};" in README
    assert f"of a whole 1.1B model {full[0]:.1f}, torch's {full[1]:.1f} |" in README


def test_contributing_draws_the_house_as_it_stands():
    layout = next(text for text in blocks(".github/CONTRIBUTING.md", "text") if text.startswith("__init__.py"))
    drawn = {line.split()[0].rstrip("/") for line in layout.splitlines()}
    package = ROOT / "hf_automagic"
    assert drawn == {path.name for path in package.iterdir() if not path.name.startswith((".", "__pycache__"))}
