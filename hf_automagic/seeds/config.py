"""The first seed's config, and its advice on how to fill it in."""

import dataclasses
import inspect
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn


@dataclasses.dataclass
class Optimizer8BitConfig:
    """Holds the first seed's options with its defaults, for `Automagic_CameAMP_8Bit(params, **config.__dict__)`.

    What each does is told by `AutomagicConfig`, where it has the same name; `verbose` logs at INFO. The fields may be
    changed; they are checked when an optimizer is built from them.
    """

    lr: float = 1e-6
    min_lr: float = 1e-7
    max_lr: float = 1e-3
    warmup_steps: int = 500
    weight_decay: float = 5e-4
    quantize_states: bool = True
    error_correction: bool = True
    block_size: int = 256
    mixed_precision: bool = True
    sync_frequency: int = 100
    edge_suppression: bool = True
    edge_penalty: float = 0.1
    edge_threshold: float = 0.6
    background_regularization: bool = True
    spatial_awareness: bool = True
    frequency_penalty: float = 0.05
    lora_rank_penalty: bool = True
    rank_penalty_strength: float = 0.01
    low_rank_emphasis: float = 1.2
    verbose: bool = False
    adaptive_block_size: bool = False
    min_block_size: int = 64
    max_block_size: int = 1024


def get_recommended_config(gpu_memory_gb: float) -> Optimizer8BitConfig:
    """Returns the first seed's advice: below 8 GB the leanest states, below 16 its defaults, else the most exact.

    Args:
        gpu_memory_gb: memory of the GPU.
    """
    if gpu_memory_gb < 8:
        return Optimizer8BitConfig(
            error_correction=False, block_size=512, edge_suppression=False, spatial_awareness=False
        )
    if gpu_memory_gb < 16:
        return Optimizer8BitConfig()
    return Optimizer8BitConfig(block_size=128, verbose=True)


def adjust_config_for_model_size(
    config: Optimizer8BitConfig, model_params: nn.Module | Iterable[Tensor]
) -> Optimizer8BitConfig:
    """Returns a copy with the first seed's block size and error correction for so many parameters.

    Below 10 million elements 128 and on, below 100 million 256 and on, else 512 and off.

    Args:
        config: stays as it is.
        model_params: a model, its parameters in a list, or `model.parameters()` as it is, which is left unread. Of any
            other generator the parameters are counted as they pass, and it is used up: pass a list to use it again.
    """
    elements = _count_elements(model_params)
    if elements < 10_000_000:
        return dataclasses.replace(config, block_size=128, error_correction=True)
    if elements < 100_000_000:
        return dataclasses.replace(config, block_size=256, error_correction=True)
    return dataclasses.replace(config, block_size=512, error_correction=False)


def _count_elements(source: Any) -> int:
    if inspect.isgenerator(source) and inspect.getgeneratorstate(source) == inspect.GEN_CREATED:
        source = inspect.getgeneratorlocals(source).get("self", source)  # the module whose method it comes from
    params = list[Any](source.parameters() if isinstance(source, nn.Module) else source)
    return sum((entry[1] if isinstance(entry, tuple) else entry).numel() for entry in params)
