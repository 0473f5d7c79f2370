"""How many bytes the optimizer holds, counted on its tensors or derived from the declared states before they exist."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..config import AutomagicConfig
from ..quantization import StateCodecs
from .context import context_bytes
from .events import EVENT_BYTES
from .groups import group_config, is_stepped, parameter_names
from .storage import Layout, codecs_of_group, store_states

SHARED_BYTES_PER_GROUP = 16  # log_rate, base_lr, effective_lr and update_rms, float32
COUNTER_BYTES = 32  # four int64 counters of the guard


@dataclasses.dataclass(frozen=True)
class MemoryStats:
    """Bytes of optimizer state; where parameters are sharded, those of all ranks together.

    Args:
        total_bytes: everything held.
        bytes_by_state: bytes of each key of `state[p]`, and of what the optimizer holds beside the parameters.
        quantized_bytes: bytes of states that a codec holds, scales included.
        parameters: number of elements that are stepped.
        kept_in_fp32: names of the parameters whose states are all in fp32.
        float_bytes: bytes of the same states in fp32.
        fallbacks: parameters whose codec could not run, so that their states are in fp32.
    """

    total_bytes: int
    bytes_by_state: dict[str, int]
    quantized_bytes: int
    parameters: int
    kept_in_fp32: tuple[str, ...]
    float_bytes: int
    fallbacks: int

    @property
    def bytes_per_parameter(self) -> float:
        """Bytes of state for each element."""
        return self.total_bytes / max(1, self.parameters)

    @property
    def compression_ratio(self) -> float:
        """Bytes held relative to the same states in fp32."""
        return self.total_bytes / max(1, self.float_bytes)

    @property
    def adam_bytes(self) -> int:
        """What Adam would hold in fp32: 8 bytes an element."""
        return 8 * self.parameters


@dataclasses.dataclass(frozen=True)
class StateBytes:
    """What one parameter's states weigh, from the declarations alone.

    Args:
        by_state: bytes of each key of `state[p]`.
        quantized: the keys that a codec writes.
        float_bytes: bytes of the same states in fp32.
    """

    by_state: dict[str, int]
    quantized: frozenset[str]
    float_bytes: int


def estimate_state(
    config: AutomagicConfig, shape: torch.Size, codecs: StateCodecs, is_full_weight: bool = False
) -> StateBytes:
    """Weighs the states that a parameter of this shape will have."""
    layout, sizes, quantized, float_bytes = Layout.of(shape), {}, set(), 0
    for stored in store_states(config, layout, codecs, is_full_weight)[1]:
        fields = stored.fields(layout.rows, layout.cols)
        sizes |= {name: math.prod(shape) * dtype.itemsize for name, (shape, dtype) in fields.items()}
        quantized |= fields.keys() if stored.codec is not None else set()
        float_bytes += 4 * math.prod(stored.shape(layout.rows, layout.cols))
    return StateBytes(sizes, frozenset(quantized), float_bytes)


def measure_memory(optimizer: Any) -> MemoryStats:
    """Counts an Automagic's bytes: of its tensors where they exist, of its declarations where they do not yet."""
    by_state: dict[str, int] = {}
    quantized = elements = float_bytes = fallbacks = 0
    in_fp32 = []
    planned: dict[Any, StateBytes] = {}
    for i, group in enumerate(optimizer.param_groups):
        config = group_config(group)
        codecs = codecs_of_group(group, optimizer.quantization_strategy)
        for param, name, stored in zip(group["params"], parameter_names([group]), codecs, strict=True):
            kind = (i, param.shape, stored)
            if kind not in planned:
                planned[kind] = estimate_state(config, param.shape, stored, group["is_full_weight"])
            plan = planned[kind]
            held = {key: t.numel() * t.element_size() for key, t in optimizer.state.get(param, {}).items()}
            if not (held or is_stepped(param)):
                continue
            for key, size in (held or plan.by_state).items():
                by_state[key] = by_state.get(key, 0) + size
                quantized += size if key in plan.quantized else 0
            elements += param.numel()
            float_bytes += plan.float_bytes
            fallbacks += stored.fell_back
            if not plan.quantized:
                in_fp32.append(name)
    shared = sum(t.numel() * t.element_size() for g in optimizer.param_groups for t in _group_tensors(g))
    by_state["shared"] = shared or _planned_shared_bytes(optimizer.param_groups)
    total = sum(by_state.values())
    return MemoryStats(
        total, by_state, quantized, elements, tuple(in_fp32), float_bytes + by_state["shared"], fallbacks
    )


def _planned_shared_bytes(groups: Sequence[Mapping[str, Any]]) -> int:
    context = context_bytes(groups[0]["context_window"]) if any(group["context"] for group in groups) else 0
    return SHARED_BYTES_PER_GROUP * len(groups) + COUNTER_BYTES + EVENT_BYTES + context


def _group_tensors(group: dict[str, Any]) -> list[Tensor]:
    return [
        tensor
        for key, value in group.items()
        if key != "params"
        for tensor in (value.values() if isinstance(value, dict) else [value])
        if isinstance(tensor, Tensor) and key not in ("lr", "initial_lr")
    ]
