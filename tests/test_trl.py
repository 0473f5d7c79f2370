"""Claims about TRL: a string in a YAML file or on the command line is enough, and the mixin shows every loss."""

import dataclasses
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("datasets")

import datasets
import trl
import yaml

from hf_automagic.callbacks import OptimizerStatsCallback
from hf_automagic.trainer import AutomagicTrainerMixin
from tests.tiny_runs import (
    argument_values,
    assert_same_bits,
    inner,
    logged_losses,
    seen_losses,
    tiny_adapter,
    tiny_llama,
    tiny_tokenizer,
    weights,
)

# trl and peft still use names that transformers has replaced
pytestmark = pytest.mark.filterwarnings("ignore:.* is deprecated and will be removed in v6:FutureWarning:transformers")

ROOT = Path(__file__).resolve().parents[1]
CONTEXT = "automagic_coptim_8bit"


def count_words(completions: Sequence[str], **others: Any) -> list[float]:
    """A reward: the number of different words."""
    return [float(len(set(completion.split()))) for completion in completions]


@dataclasses.dataclass(frozen=True)
class Method:
    """One of TRL's ways to train: its classes, a row of its data, and what only it needs."""

    name: str
    trainer: str
    config: str
    row: dict[str, str]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    given: dict[str, Any] = dataclasses.field(default_factory=dict)


SAMPLING = {"max_completion_length": 4, "num_generations": 2}
METHODS = [
    Method("sft", "SFTTrainer", "SFTConfig", {"text": "w3 w4 w5 w6 w7"}, {"max_length": 16}),
    Method(
        "dpo",
        "DPOTrainer",
        "DPOConfig",
        {"prompt": "w3 w4", "chosen": " w5 w6", "rejected": " w7 w8"},
        {"max_length": 16},
    ),
    Method("grpo", "GRPOTrainer", "GRPOConfig", {"prompt": "w3 w4"}, SAMPLING, {"reward_funcs": count_words}),
]
ALL = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)


def build(method: Method, tmp_path: Path, mixin: bool = False, model: Any = None, **changes: Any) -> Any:
    cls = getattr(trl, method.trainer)
    if mixin:
        cls = type(f"My{method.trainer}", (AutomagicTrainerMixin, cls), {})
    options = {"bf16": False, "optim": CONTEXT, **method.options, **changes}
    return cls(
        model=tiny_adapter() if model is None else model,
        args=getattr(trl, method.config)(**argument_values(tmp_path, **options)),
        train_dataset=datasets.Dataset.from_list([method.row] * 16),
        processing_class=tiny_tokenizer(),
        callbacks=[OptimizerStatsCallback(plots=False)],
        **method.given,
    )


# losses


@ALL
def test_the_mixin_shows_the_context_the_losses_that_are_logged(tmp_path, method):
    trainer = build(method, tmp_path, mixin=True, gradient_accumulation_steps=2)
    trainer.train()
    assert logged_losses(trainer) == seen_losses(trainer)


@ALL
def test_a_stock_class_listens_only_to_the_loss_that_it_steps_on(tmp_path, method, caplog):
    trainer = build(method, tmp_path, max_steps=2)
    with caplog.at_level("INFO", logger="hf_automagic"):
        trainer.train()
    told = f"the context follows the gradients alone, as {method.trainer} computes its loss outside the model"
    if method.name == "sft":
        assert logged_losses(trainer) == seen_losses(trainer)
        assert told not in caplog.text
    else:
        assert torch.tensor(inner(trainer).c_optim.history().losses).isnan().all()
        ours = f"class My{method.trainer}(hf_automagic.AutomagicTrainerMixin, {method.trainer})"
        assert f"{told}. {ours} mends that." in caplog.text


def test_a_loss_reweighted_outside_the_model_is_another_loss(tmp_path):
    trainer = build(METHODS[0], tmp_path, max_steps=1, loss_type="dft")
    trainer.train()
    assert torch.tensor(inner(trainer).c_optim.history().losses).isnan().all()


# resumes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.matrix("T2")
def test_sft_with_the_mixin_resumes_bit_for_bit(tmp_path, dtype):
    changes = {"mixin": True, "max_steps": 4}
    whole = build(METHODS[0], tmp_path, model=tiny_adapter(dtype), save_strategy="steps", save_steps=2, **changes)
    whole.train()
    resumed = build(METHODS[0], tmp_path, model=tiny_adapter(dtype), **changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    adapters = [p for p in resumed.model.parameters() if p.requires_grad]
    assert {p.dtype for p in adapters} == {dtype}
    assert_same_bits(weights(whole.model), weights(resumed.model))
    for p, q in zip((p for p in whole.model.parameters() if p.requires_grad), adapters, strict=True):
        assert_same_bits(inner(whole).state[p], inner(resumed).state[q])


# from a file and from the command line


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def options_of(method: Method, model: Path, tmp_path: Path) -> dict[str, Any]:
    """The options of a run of one of TRL's scripts: one step on an adapter of a local model, and a checkpoint."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.jsonl").write_text("".join(json.dumps(method.row) + "\n" for _ in range(8)))
    rewards = {"reward_funcs": ["tests.test_trl.count_words"]} if method.name == "grpo" else {}
    return {
        **argument_values(tmp_path / "out", max_steps=1, save_strategy="steps", save_steps=1),
        "model_name_or_path": str(model),
        "dtype": "float32",
        "dataset_name": str(data),
        "use_peft": True,
        "lora_r": 4,
        "lora_target_modules": ["q_proj", "v_proj"],
        "bf16": False,
        "optim": "automagic_8bit",
        "optim_args": "max_lr=5e-4, beta1=0.85",
        **method.options,
        **rewards,
    }


def as_yaml(options: dict[str, Any], tmp_path: Path) -> list[str]:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(options))
    return ["--config", str(path)]


def as_arguments(options: dict[str, Any], tmp_path: Path) -> list[str]:
    line: list[str] = []
    for name, value in options.items():
        line += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return line


def assert_one_step_was_ours(tmp_path: Path) -> None:
    """Looks at what a run left behind: our groups with their options, and one step with them."""
    checkpoint = tmp_path / "out" / "checkpoint-1"
    groups = torch.load(checkpoint / "optimizer.pt", weights_only=True)["param_groups"]
    assert [(group["role"], group["max_lr"], group["betas"][0]) for group in groups] == [
        ("lora_A", pytest.approx(3e-4), 0.85),  # twice 0.3 of it: the model is narrow
        ("lora_B", pytest.approx(2.4e-3), 0.85),
    ]
    assert int(groups[0]["counters"]["applied"]) == 1
    assert json.loads((checkpoint / "trainer_state.json").read_text())["global_step"] == 1


@ALL
@pytest.mark.parametrize("spell", [as_yaml, as_arguments])
def test_a_script_of_trl_trains_a_step(tmp_path, model_folder, method, spell):
    script = importlib.import_module(f"trl.scripts.{method.name}")
    line = spell(options_of(method, model_folder, tmp_path), tmp_path)
    script.main(*script.make_parser().parse_args_and_config(line))
    assert_one_step_was_ours(tmp_path)


@pytest.mark.slow
@ALL
def test_a_command_trains_a_step(tmp_path, model_folder, method):
    script = f"trl.scripts.{method.name}"
    code = f"import hf_automagic, runpy; runpy.run_module('{script}', run_name='__main__', alter_sys=True)"
    line = as_arguments(options_of(method, model_folder, tmp_path), tmp_path)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *line], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-4000:]
    assert "optim=automagic_8bit: lr 0.001 from learning_rate" in run.stderr
    assert_one_step_was_ours(tmp_path)
