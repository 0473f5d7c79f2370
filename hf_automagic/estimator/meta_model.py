"""Builds the model of a plan without data, and weighs what is loaded."""

import inspect
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .plan import TrainingPlan

FOUR_BIT_BLOCK = 64  # of bitsandbytes' NF4 and FP4, as transformers loads them: an fp32 maximum a block
FOUR_BIT_TABLE = 16 * 4  # the sixteen values of a code, held by every layer
# PEFT trains the head of these besides the adapters, where it is told the task.
TASKS = {"ForCausalLM": "CAUSAL_LM", "ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS"}


def build(plan: TrainingPlan) -> tuple[nn.Module, int]:
    """Returns the model on the meta device, with adapters where the plan has them, and the bytes of frozen tensors.

    Raises:
        ValueError: there is no such model, its sequences are shorter, or its adapters have no target.
    """
    config = load_config(plan.model)
    longest = longest_sequence(config)
    if plan.sequence_length > longest:
        raise ValueError(
            f"sequence_length must be at most {longest}, which is the model's, got {plan.sequence_length}"
        )
    cls: Any = _model_class(config)
    with torch.device("meta"), _default_dtype(torch.float32 if plan.base == "fp32" else torch.bfloat16):
        model = cls.from_config(config) if hasattr(cls, "from_config") else cls(config)
        model.tie_weights()  # transformers 5.0 leaves that out on the meta device
    saved = _saved_by_quantization(model, plan) if plan.is_quantized else 0
    if plan.rank is not None:
        model = _with_adapters(model, plan, type(model).__name__)
    frozen = [p for p in model.parameters() if not p.requires_grad] + list(model.buffers())
    return model, sum(map(_size, frozen)) - saved


def load_config(name: str) -> Any:
    """Returns the config of a model id, a folder or a file.

    Raises:
        ValueError: there is none, or it cannot be reached.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{name!r} is no folder or file with a config, nor a model id that can be reached; "
            "pass the path of a config.json"
        ) from error


def longest_sequence(config: Any) -> float:
    """Returns how many tokens a model reads at once; infinity where its config sets no bound."""
    return getattr(config, "max_position_embeddings", None) or math.inf


def example_inputs(model: nn.Module, plan: TrainingPlan) -> dict[str, Tensor]:
    """Returns a batch without data, with labels where the model computes a loss.

    Raises:
        ValueError: the model reads something other than tokens and images.
    """
    owner: Any = model
    inner = owner.get_base_model() if hasattr(owner, "get_base_model") else owner
    kind, config = inner.main_input_name, inner.config
    if kind not in ("input_ids", "pixel_values"):
        raise ValueError(f"activations are simulated for tokens and images, and {type(inner).__name__} reads {kind!r}")
    with torch.device("meta"):
        if kind == "input_ids":
            given = torch.zeros(plan.batch, plan.sequence_length, dtype=torch.long)
        else:
            size = config.image_size
            given = torch.zeros(plan.batch, config.num_channels, *((size, size) if isinstance(size, int) else size))
        inputs = {kind: given}
        if "labels" in inspect.signature(inner.forward).parameters:
            is_one_each = "Classification" in type(inner).__name__ and "Token" not in type(inner).__name__
            inputs["labels"] = torch.zeros((plan.batch,) if is_one_each else given.shape[:2], dtype=torch.long)
    return inputs


def largest_linear(model: nn.Module) -> int:
    """Returns the number of weights of the largest linear layer, which is held unpacked while it is computed with."""
    return max((m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear)), default=0)


def _model_class(config: Any) -> Any:
    """Returns the class that the config names, or the one for text that suits it best."""
    import transformers

    for name in getattr(config, "architectures", None) or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    return transformers.AutoModelForCausalLM


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Makes new parameters of a dtype; unlike a cast this leaves buffers that have to be fp32 alone."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _with_adapters(model: nn.Module, plan: TrainingPlan, name: str) -> nn.Module:
    import peft

    target = plan.target if plan.target == "all-linear" else plan.target.split(",")
    task = next((task for ending, task in TASKS.items() if name.endswith(ending)), None)
    return peft.get_peft_model(model, peft.LoraConfig(r=plan.rank or 0, target_modules=target, task_type=task))  # type: ignore[arg-type]


def _saved_by_quantization(model: nn.Module, plan: TrainingPlan) -> int:
    """Returns by how many bytes bitsandbytes' codes are smaller than the weights that they replace."""
    try:
        from transformers.quantizers.base import get_keys_to_not_convert
    except ImportError:  # where transformers 4 has it
        from transformers.integrations.bitsandbytes import get_keys_to_not_convert  # type: ignore[attr-defined, no-redef]

    kept = get_keys_to_not_convert(model)
    linears = [
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not any(name == key or name.startswith(f"{key}.") for key in kept)
    ]
    return sum(_size(weight) - quantized_bytes(weight.shape, plan.base) for weight in linears)


def quantized_bytes(shape: torch.Size, precision: str) -> int:
    """Returns the bytes of a linear layer's weight as bitsandbytes holds it, scales and table included."""
    if precision == "8bit":
        return shape.numel() + 4 * shape[0]
    return math.ceil(shape.numel() / 2) + 4 * math.ceil(shape.numel() / FOUR_BIT_BLOCK) + FOUR_BIT_TABLE


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
