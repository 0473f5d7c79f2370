"""Ways to adapt a tiny model by PEFT, as data."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
pytest.importorskip("transformers")

import peft
import transformers  # noqa: F401  the tests' own name for it

from tests import tiny_runs

# PEFT asks transformers for a property under its old name
IGNORE_OLD_NAME = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning:transformers")


tiny_llama = partial(tiny_runs.tiny_llama, num_hidden_layers=1, num_labels=3)


class TinyConv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x)).mean((2, 3))


@dataclass(frozen=True)
class Tuner:
    """One way to adapt a model: PEFT's config class, its arguments, and the roles of what it trains.

    `second` are the arguments of another adapter of that class, which trains beside the first.
    """

    name: str
    config: str
    options: dict[str, Any]
    roles: dict[str, int]
    model: Callable[[], nn.Module] = tiny_llama
    pairs: int = 0
    facts: dict[str, Any] = field(default_factory=dict)
    labels: tuple[int, ...] = ()
    inputs: dict[str, Any] = field(default_factory=dict)
    second: dict[str, Any] = field(default_factory=dict)

    def loss(self, model: nn.Module) -> torch.Tensor:
        """The loss of the adapted model on a fixed batch of two."""
        if self.model is TinyConv:
            return model(torch.ones(2, 4, 5, 5)).square().mean()
        tokens = torch.arange(12).reshape(2, 6)
        labels = torch.tensor(self.labels) if self.labels else tokens
        return model(input_ids=tokens, labels=labels, **self.inputs).loss


QV = {"target_modules": ["q_proj", "v_proj"]}
Q = {"target_modules": ["q_proj"]}
AB = {"lora_A": 1, "lora_B": 1}
TWO = {"lora_A": 2, "lora_B": 2}
PROMPT = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
TASKS = {"task_ids": torch.tensor([0, 1])}


def lora(
    name: str,
    roles: dict[str, int],
    pairs: int,
    facts: dict[str, Any] | None = None,
    model: Any = tiny_llama,
    **options: Any,
) -> Tuner:
    return Tuner(name, "LoraConfig", {"r": 4, "lora_alpha": 8, **QV, **options}, roles, model, pairs, facts or {})


def other(name: str, roles: dict[str, int], facts: dict[str, Any] | None = None, **options: Any) -> Tuner:
    return Tuner(name.lower(), f"{name}Config", options, roles, facts=facts or {})


TUNERS = [
    lora("lora", TWO, 2, {"rank": {4}, "scaling": {2.0}}),
    lora("rslora", TWO, 2, {"scaling": {4.0}}, use_rslora=True),
    lora("pissa", TWO, 2, init_lora_weights="pissa"),
    lora("dora", {**TWO, "magnitude": 2}, 2, use_dora=True),
    lora("lora_bias", {**TWO, "bias": 2}, 2, lora_bias=True),
    lora(
        "rank_pattern",
        TWO,
        2,
        {"rank": {4, 2}, "scaling": {2.0, 3.0}},
        rank_pattern={"v_proj": 2},
        alpha_pattern={"v_proj": 6},
    ),
    lora("embedding", {**AB, "embedding_A": 1, "embedding_B": 1}, 2, target_modules=["embed_tokens", "q_proj"]),
    lora("conv", AB, 1, model=TinyConv, target_modules=["conv"]),
    lora("parameters", AB, 1, target_modules=[], target_parameters=["q_proj.weight"]),
    lora("block_diagonal", AB, 0, **Q, use_bdlora=("BdLoraConfig", {"target_modules_bd_a": ["q_proj"], "nblocks": 2})),
    lora("tokens_too", {**TWO, "adapter": 1}, 2, trainable_token_indices={"embed_tokens": [1]}),
    replace(
        lora("head", {**TWO, "new": 1}, 2, task_type="SEQ_CLS"),
        model=partial(tiny_llama, head="LlamaForSequenceClassification"),
        labels=(0, 1),
    ),
    lora(
        "saved",
        {**TWO, "embedding": 1, "new": 1, "norm": 3},
        2,
        modules_to_save=["embed_tokens", "lm_head", "norm"],
    ),
    replace(
        lora("two_adapters", {"lora_A": 3, "lora_B": 3}, 3, {"rank": {4, 2}, "scaling": {2.0, 1.5}}),
        second={"r": 2, "lora_alpha": 3, **Q},
    ),
    lora("base_bias", {**AB, "bias": 1, "norm": 1}, 1, model=TinyConv, target_modules=["conv"], bias="all"),
    other("AdaLora", {**TWO, "adapter": 2}, {"scaling": {2.0}}, init_r=4, total_step=9, tinit=1, tfinal=1, **QV),
    other("LoHa", {"adapter": 8}, r=2, **QV),
    other("LoKr", {"adapter": 4}, r=2, **QV),
    other("Vera", {"adapter": 4}, r=4, **QV),
    other("IA3", {"adapter": 2}, target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    other("OFT", {"adapter": 2}, oft_block_size=4, **QV),
    other("BOFT", {"adapter": 4}, boft_block_size=4, **QV),
    other("FourierFT", {"adapter": 2}, n_frequency=8, **QV),
    other("LNTuning", {"norm": 1}, target_modules=["input_layernorm"]),
    other("TrainableTokens", {"adapter": 1}, token_indices=[1, 5], target_modules=["embed_tokens"]),
    other("PromptTuning", {"adapter": 1}, **PROMPT),
    other("PrefixTuning", {"adapter": 1}, **PROMPT),
    other("PromptEncoder", {"adapter": 4, "bias": 3}, encoder_hidden_size=8, **PROMPT),
    other("AdaptionPrompt", {"adapter": 2}, adapter_len=3, adapter_layers=1),
    other("Adamss", {"adapter": 20}, **QV),
    other("Beft", {"adapter": 2}, **QV),
    other("C3A", {"adapter": 2}, block_size=4, **QV),
    other("Cartridge", {"adapter": 1}, **PROMPT),
    other("Deft", {"adapter": 4}, **QV),
    other("Delora", {"adapter": 6}, r=2, **QV),
    other("Frod", {"adapter": 4}, **QV),
    other("Glora", {"adapter": 8}, **QV),
    other("Gralora", {"adapter": 4}, r=4, gralora_k=2, **QV),
    other("HRA", {"adapter": 2}, r=2, **QV),
    other("Hira", {"adapter": 4}, r=2, **QV),
    other("Lily", {"adapter": 6}, r=4, **QV),
    other("Miss", {"adapter": 2}, r=4, **QV),
    replace(other("MultitaskPromptTuning", {"adapter": 3}, num_tasks=2, num_ranks=1, **PROMPT), inputs=TASKS),
    other("OSF", {"adapter": 6}, **QV),
    other("Peanut", {"adapter": 4}, **QV),
    replace(
        other("Poly", {"adapter": 6}, task_type="CAUSAL_LM", r=2, n_tasks=2, n_skills=2, n_splits=2, **QV),
        inputs=TASKS,
    ),
    other("Psoft", {"adapter": 6}, r=4, **QV),
    other("Pvera", {"adapter": 4}, r=4, **QV),
    other("RandLora", {"adapter": 4}, r=4, **QV),
    other("Road", {"adapter": 4}, group_size=8, **QV),
    other("Shira", {"adapter": 2}, r=2, **QV),
    other("Supertuning", {"adapter": 2}, **QV),
    other("TinyLora", {"adapter": 2}, **QV),
    other("UniLora", {"adapter": 1}, **QV),
    other("WaveFT", {"adapter": 2}, n_frequency=8, **QV),
    other("VBLoRA", {"adapter": 5}, r=2, vector_length=4, num_vectors=8, topk=2, **QV),
]


def adapt(tuner: Tuner) -> nn.Module:
    torch.manual_seed(0)
    for name in (tuner.config, *(value[0] for value in tuner.options.values() if isinstance(value, tuple))):
        if not hasattr(peft, name):
            pytest.skip(f"peft {peft.__version__} has no {name}")
    options = {
        name: getattr(peft, value[0])(**value[1]) if isinstance(value, tuple) else value
        for name, value in tuner.options.items()
    }
    config = getattr(peft, tuner.config)
    model = peft.get_peft_model(tuner.model(), config(**options))
    if tuner.second:
        model.add_adapter("second", config(**tuner.second))
        model.base_model.set_adapter(["default", "second"])
    return model


def tuner_named(name: str) -> Tuner:
    return next(tuner for tuner in TUNERS if tuner.name == name)
