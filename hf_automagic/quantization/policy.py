"""Decides how a parameter's states are stored: by its global size and role, never by the size of a shard."""

import dataclasses
import fnmatch
import functools
import logging
from typing import Any, Protocol

import torch

from ..config import AutomagicConfig
from .core import Codec, make_codec
from .feedback import WithFeedback
from .log16 import Log16

logger = logging.getLogger(__name__)

FEW_ROWS = 16  # of a matrix narrower than this the vectors weigh as much as the momentum's codes: they get 16 bits
EMBEDDING = "embedding"  # a role: rows that are seldom stepped, whose averages differ by many octaves


class QuantizationStrategy(Protocol):
    """Decides in the user's own way what is stored in few bits (the first seed's object)."""

    def should_quantize(self, param_name: str, param_shape: torch.Size, param_type: str) -> bool:
        """Returns whether a parameter's states may be quantised; `param_type` is its role, such as 'lora_A'."""
        ...

    def get_block_size(self, param_shape: torch.Size) -> int:
        """Returns the elements that share a scale, a power of two from 32 to 4096."""
        ...


@dataclasses.dataclass(frozen=True)
class ParamInfo:
    """What may be known of a parameter before its storage is chosen.

    Args:
        name: its name in the model.
        shape: of the whole parameter, not of a shard.
        role: what it is to the model, see `optim.roles.Role`.
        device: where its states will live.
        block_size: chosen for this parameter by measurement, None without.
    """

    name: str
    shape: torch.Size
    role: str
    device: torch.device
    block_size: int | None = None


@dataclasses.dataclass(frozen=True)
class StateCodecs:
    """The codecs of one parameter's states, None for plain float32.

    Args:
        matrix: for states of the parameter's shape.
        vector: for non-negative states along its rows or columns.
        fell_back: whether the codec that was asked for could not run here.
    """

    matrix: Codec | None = None
    vector: Codec | None = None
    fell_back: bool = False


def choose_codecs(
    param: ParamInfo, config: AutomagicConfig, strategy: QuantizationStrategy | None = None
) -> StateCodecs:
    """Returns how the states of one parameter are stored.

    Vectors always stay in float32: they weigh nothing, and a scale for each element would cost more than it saves.

    Args:
        param: what is known of it.
        config: options of its group; `storage_overrides` may change them for its name.
        strategy: decides instead of the options on size and role, and on the block size.

    Raises:
        TypeError: there is no codec of the given name.
        ValueError: the strategy's block size is not allowed.
        RuntimeError: the codec cannot run here, and `strict` is on.
    """
    config = _overridden(config, param.name)
    codec = make_codec(config.codec, _block_size(param, config, strategy))
    if not (config.quantize_states and _is_worth_it(param, config, strategy)):
        return StateCodecs()
    rows = param.shape[0]
    narrow = min(rows, param.shape.numel() // rows) < FEW_ROWS
    in_16_bits = config.vector_precision == "log16" or (config.vector_precision == "auto" and narrow)
    in_16_bits = in_16_bits and param.role != EMBEDDING
    matrix = WithFeedback(codec, config.sync_frequency) if config.error_correction else codec
    matrix_runs = _runs(config.codec, param.device.type, config.strict)
    vector_runs = not in_16_bits or _runs("log16", param.device.type, config.strict)
    return StateCodecs(
        matrix if matrix_runs else None,
        Log16() if in_16_bits and vector_runs else None,
        fell_back=not (matrix_runs and vector_runs),
    )


def _overridden(config: AutomagicConfig, name: str) -> AutomagicConfig:
    changes: dict[str, Any] = {}
    for pattern, options in (config.storage_overrides or {}).items():
        if fnmatch.fnmatchcase(name, pattern):
            changes |= options
    return config.replace(**changes) if changes else config


def _block_size(param: ParamInfo, config: AutomagicConfig, strategy: QuantizationStrategy | None) -> int:
    if param.block_size is not None:
        return param.block_size
    if strategy is None:
        return config.block_size
    return config.replace(block_size=strategy.get_block_size(param.shape)).block_size


def _is_worth_it(param: ParamInfo, config: AutomagicConfig, strategy: QuantizationStrategy | None) -> bool:
    shape = param.shape
    if len(shape) < 2 or shape.numel() <= shape[0]:
        return False
    if strategy is not None:
        return bool(strategy.should_quantize(param.name, shape, param.role))
    if config.embeddings_in_fp32 and param.role == EMBEDDING:
        return False
    return shape.numel() >= config.min_8bit_size or not config.mixed_precision


def _runs(codec: str, device_type: str, strict: bool) -> bool:
    problem = find_problem(codec, device_type)
    if problem and strict:
        raise RuntimeError(f"codec {codec!r} cannot run on {device_type}: {problem}")
    return problem is None


@functools.cache
def find_problem(codec: str, device_type: str) -> str | None:
    """Tries a codec on a device, once; returns why it cannot run there, and says so in the log. None where it can."""
    device = torch.device("cpu" if device_type == "meta" else device_type)
    try:
        trial = Log16() if codec == "log16" else make_codec(codec, 64)
        trial.decode(trial.encode(torch.ones((1, 1, 64), device=device)))
    except (ImportError, OSError, RuntimeError, ValueError, AttributeError) as error:
        logger.warning("codec %r cannot run on %s, these states stay in fp32: %s", codec, device_type, error)
        return str(error)
    return None
