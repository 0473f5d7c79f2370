"""Tiny models, data and TrainingArguments, so that a real Trainer runs a few steps in a second."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging import version
from torch import nn
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_automagic.callbacks import OptimizerStatsCallback
from hf_automagic.trainer import AutomagicTrainerMixin

VOCABULARY = 32
CONTEXT = "automagic_coptim_8bit"
# transformers 4 logs four digits of a loss
LOGGED_TO = 5.1e-5 if version.parse(transformers.__version__).major < 5 else 1e-12


def tiny_llama(dtype: torch.dtype = torch.float32, head: str = "LlamaForCausalLM", **changes: int) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, **changes}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32}
    config = transformers.LlamaConfig(**sizes, **heads, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return getattr(transformers, head)(config).to(dtype)


def tiny_adapter(dtype: torch.dtype = torch.float32) -> Any:
    """A LoRA on a tiny Llama, adapters in the dtype of the base."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = tiny_llama(dtype)
    torch.manual_seed(1)
    return get_peft_model(model, lora, autocast_adapter_dtype=False)


def tiny_tokenizer() -> Any:
    """Knows the words w3 to w31 and `<pad>`, `<s>`, `</s>`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, VOCABULARY)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    options = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "padding_side": "left"}
    inputs = ["input_ids", "attention_mask"]  # transformers 4 adds token types, which a Llama does not take
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=inputs, **options)


def sentences(count: int, length: int = 8) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, VOCABULARY, (count, length), generator=generator).tolist()
    return [{"input_ids": row, "labels": row} for row in rows]


class TinyRegression(nn.Module):
    """A small network on floats, which can be not a number."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (self.layers(x) - y).square().mean()}


class InOrder(IterableDataset):
    """Points of a regression, always in the same order."""

    def __init__(self, points: list[dict[str, torch.Tensor]]) -> None:
        self.points = points

    def __iter__(self) -> Any:
        return iter(self.points)


def regression_points(count: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 4, generator=generator)
    return [{"x": row, "y": row.sum(0, keepdim=True)} for row in x]


def arguments(output_dir: Path, **changes: Any) -> TrainingArguments:
    return TrainingArguments(**argument_values(output_dir, **changes))


def argument_values(output_dir: Path, **changes: Any) -> dict[str, Any]:
    return {
        "output_dir": str(output_dir),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        **changes,
    }


def language(output_dir: Path, cls: type[Trainer] = Trainer, model: Any = None, **changes: Any) -> Any:
    """A Trainer on sentences; what is none of its own arguments goes into its TrainingArguments."""
    own = {name: changes.pop(name) for name in ("compute_loss_func", "optimizers") if name in changes}
    return cls(
        model=tiny_llama() if model is None else model,
        args=arguments(output_dir, **{"optim": CONTEXT, **changes}),
        train_dataset=sentences(64),
        eval_dataset=sentences(4),
        callbacks=[OptimizerStatsCallback(plots=False)] if issubclass(cls, AutomagicTrainerMixin) else None,
        **own,
    )


class Recorder(TrainerCallback):
    """Stands for a tracker: keeps the logs that it is shown."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **event: Any) -> None:
        self.logs.append(dict(logs))


def training_logs(trainer: Any) -> list[dict[str, Any]]:
    return [log for log in trainer.state.log_history if "loss" in log]


def inner(trainer: Any) -> Any:
    """The optimizer inside accelerate's wrapper."""
    return getattr(trainer.optimizer, "optimizer", trainer.optimizer)


def seen_losses(trainer: Any, skip: int = 0) -> Any:
    """What the context of a Trainer's optimizer saw of the losses, for comparison with those logged."""
    return pytest.approx(list(inner(trainer).c_optim.history().losses[skip:]), abs=LOGGED_TO, nan_ok=True)


def logged_losses(trainer: Any) -> list[float]:
    return [log["loss"] for log in training_logs(trainer)]


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same_bits(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert torch.equal(tensor, right[name]), name
