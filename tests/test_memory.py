"""The optimizer says to the byte what it holds, before it holds it, and holds no more than the goals allow."""

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from hf_automagic import Automagic, AutomagicConfig
from hf_automagic.config import PRESETS, storage_option_names
from hf_automagic.optim.memory import MemoryStats
from hf_automagic.peft import param_groups
from tests.peft_cases import IGNORE_OLD_NAME, peft, transformers

pytestmark = IGNORE_OLD_NAME

SMALL = {
    "vocab_size": 200,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LLAMA_3_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
TINY_LLAMA_1B = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
}


def full(sizes: dict[str, int] = SMALL) -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))


def lora(rank: int, sizes: dict[str, int] = SMALL, **options: Any) -> nn.Module:
    config = peft.LoraConfig(r=rank, target_modules="all-linear", **options)
    return peft.get_peft_model(full(sizes), config)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "rank 4": lambda: lora(4),
    "rank 8": lambda: lora(8),
    "rank 16": lambda: lora(16),
    "rank 64": lambda: lora(64),
    "dora": lambda: lora(16, use_dora=True),
    "full": full,
    "Llama-3-8B rank 16": lambda: lora(16, LLAMA_3_8B),
    "full 1B": lambda: full(TINY_LLAMA_1B),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    **PRESETS,
    "fp32": {"quantize_states": False},
    "all small": {"mixed_precision": False, "vector_precision": "log16", "error_correction": True},
    "seed A": {"codec": "affine", "block_size": 256, "error_correction": True, "lr_granularity": "element"},
    "seed B": {"codec": "dynamic", "block_size": 4096, "momentum_scales": (1, 5, 10, 25), "context": True},
    "full second moment": {"factored": False},
}


@functools.cache
def built(name: str, device: str) -> nn.Module:
    with torch.device(device):
        return MODELS[name]()


def walk(value: Any) -> int:
    """Bytes of every tensor in nested containers."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return sum(walk(part) for part in parts)


def held(optimizer: Automagic) -> int:
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    return walk(groups) + walk(list(optimizer.state.values()))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", list(MODELS)[:6])
@pytest.mark.matrix("T19")
def test_stats_are_the_tensors_and_known_before_they_exist(name: str, options: dict[str, Any]):
    real = built(name, "cpu")
    optimizer = Automagic(param_groups(real), **options)
    promised = optimizer.memory_stats()
    assert Automagic(param_groups(built(name, "meta")), **options).memory_stats() == promised
    for param in real.parameters():
        param.grad = torch.randn_like(param) if param.requires_grad else None
    optimizer.step()
    assert optimizer.memory_stats() == promised
    assert promised.total_bytes == held(optimizer)


@dataclasses.dataclass(frozen=True)
class Goal:
    """A row of the goals: bytes of state an element, of which Adam has 8."""

    preset: str
    lora: float
    full: float


GOALS = [
    Goal("default", 1.6, 1.03),
    Goal("conservative", 0.45 * 8, 0.45 * 8),
    Goal("balanced", 2.6, 2.05),
    Goal("aggressive", 1.33, 1.03),
]


def stats_of(model: str, preset: str) -> MemoryStats:
    config = AutomagicConfig.preset(preset) if preset in PRESETS else AutomagicConfig()
    return Automagic(param_groups(built(model, "meta")), config).memory_stats()


@pytest.mark.parametrize("goal", GOALS, ids=lambda goal: goal.preset)
def test_llama_3_8b_rank_16_meets_the_goal(goal: Goal):
    stats = stats_of("Llama-3-8B rank 16", goal.preset)
    assert stats.parameters == 41_943_040
    assert stats.bytes_per_parameter <= goal.lora


@pytest.mark.parametrize("goal", GOALS, ids=lambda goal: goal.preset)
def test_a_full_1b_model_meets_the_goal(goal: Goal):
    stats = stats_of("full 1B", goal.preset)
    assert stats.parameters == 1_100_048_384
    assert stats.bytes_per_parameter <= goal.full


@pytest.mark.parametrize(
    ("preset", "lora_bytes", "full_bytes"),
    [("conservative", 3.07, 2.52), ("balanced", 2.57, 2.02), ("aggressive", 1.32, 1.02)],
)
def test_presets_weigh_what_their_comment_says(preset: str, lora_bytes: float, full_bytes: float):
    assert round(stats_of("Llama-3-8B rank 16", preset).bytes_per_parameter, 2) == lora_bytes
    assert round(stats_of("full 1B", preset).bytes_per_parameter, 2) == full_bytes


def test_presets_change_storage_and_granularity_alone():
    for options in PRESETS.values():
        assert options.keys() <= {*storage_option_names(), "lr_granularity"}


def test_an_unknown_preset_is_answered_with_the_nearest():
    with pytest.raises(TypeError, match="there is no preset 'agressive'; did you mean 'aggressive'"):
        AutomagicConfig.preset("agressive")


def test_a_preset_gives_way_to_what_is_set_beside_it():
    assert AutomagicConfig.preset("aggressive", vector_precision="fp32") == AutomagicConfig(vector_precision="fp32")


def test_what_stays_in_fp32_is_named():
    params = {"small": torch.nn.Parameter(torch.zeros(8, 8)), "large": torch.nn.Parameter(torch.zeros(64, 64))}
    assert Automagic(params.items()).memory_stats().kept_in_fp32 == ("small",)


def test_compression_is_against_the_same_states_in_fp32():
    param = torch.nn.Parameter(torch.zeros(128, 128))
    stats = Automagic([param], lr_granularity="element").memory_stats()
    shared = stats.bytes_by_state["shared"]
    floats = 4 * (2 * 128 * 128 + 4 * 128 + 1) + shared  # momentum and mask, four vectors, the step
    assert stats.float_bytes == floats
    assert stats.compression_ratio == stats.total_bytes / floats
    assert stats.quantized_bytes == 128 * 128 + 2 * 128
    assert stats.adam_bytes == 8 * 128 * 128


def test_stats_leave_the_log_alone(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.DEBUG):
        Automagic([torch.nn.Parameter(torch.zeros(64, 64))]).memory_stats()
    assert not [r for r in caplog.records if r.name.startswith("hf_automagic.quantization")]
