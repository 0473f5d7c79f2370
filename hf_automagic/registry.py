"""The optimizers by name: one record each, saying what it is and which options make it."""

import dataclasses
import fnmatch
import re
import threading
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from .config import make_config
from .options import unknown_name_error


@dataclasses.dataclass(frozen=True)
class OptimizerInfo:
    """Describes one optimizer: its name as an `optim=` string, and what it changes about the default options.

    Args:
        name: lower case letters, digits and underscores.
        description: one sentence for lists and help texts.
        options: options of `AutomagicConfig` that differ from their defaults; what the user sets wins over them.
        papers: arXiv ids of the ideas it is made of.

    Raises:
        TypeError: an option does not exist.
        ValueError: the name is no identifier, or an option is outside its bounds.
    """

    name: str
    description: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    papers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Checks the record, so that what is registered can be built."""
        if not re.fullmatch(r"[a-z][a-z0-9_]*", self.name):
            raise ValueError(f"name must be lower case letters, digits and underscores, got {self.name!r}")
        make_config(self.options)
        object.__setattr__(self, "options", MappingProxyType(dict(self.options)))


_RECORDS: dict[str, OptimizerInfo] = {}
_LOCK = threading.Lock()


def register_optimizer(info: OptimizerInfo) -> None:
    """Adds an optimizer; `integrations.transformers.register()` then makes its name an `optim=` string.

    Registering an equal record again changes nothing.

    Raises:
        ValueError: another optimizer has this name.
    """
    with _LOCK:
        if _RECORDS.setdefault(info.name, info) != info:
            raise ValueError(
                f"there is an optimizer {info.name!r} already; unregister_optimizer it first, or pick a new name"
            )


def unregister_optimizer(name: str) -> OptimizerInfo:
    """Removes an optimizer and returns its record.

    Raises:
        TypeError: there is no optimizer of this name.
    """
    info = get_optimizer_info(name)
    with _LOCK:
        return _RECORDS.pop(info.name, info)


def list_optimizers(pattern: str = "*") -> list[str]:
    """Returns the sorted names that match a pattern with wildcards, such as `"automagic*"` or `"*_8bit"`."""
    return sorted(fnmatch.filter(tuple(_RECORDS), pattern))


def get_optimizer_info(name: str) -> OptimizerInfo:
    """Returns the record of an optimizer.

    Raises:
        TypeError: there is no optimizer of this name; the nearest one is given.
    """
    info = _RECORDS.get(name)
    if info is None:
        raise unknown_name_error("optimizer", name, _RECORDS)
    return info


_CAME = "2307.02047"
_CAUTIOUS = "2411.16085"
_COPTIM = {
    "betas": (0.8, 0.99, 0.999),
    "lr_granularity": "element",
    "context": True,
    "cautious": True,
    "momentum_scales": (1, 5, 10, 25),
}

for _info in (
    OptimizerInfo(
        "automagic_8bit",
        "CAME's direction at a rate by role, width and step, whatever rate you give, with the momentum in 8 bits.",
        papers=(_CAME,),
    ),
    OptimizerInfo(
        "automagic",
        "CAME's direction at a rate by role, width and step, whatever rate you give, with states in fp32.",
        {"quantize_states": False},
        papers=(_CAME,),
    ),
    OptimizerInfo(
        "automagic_coptim_8bit",
        "Automagic with four momenta, a cautious mask and a context that slows down where the loss jumps, in 8 bits.",
        _COPTIM,
        papers=(_CAME, _CAUTIOUS),
    ),
    OptimizerInfo(
        "automagic_coptim",
        "Automagic with four momenta, a cautious mask and a context that slows down where the loss jumps, in fp32.",
        {**_COPTIM, "quantize_states": False},
        papers=(_CAME, _CAUTIOUS),
    ),
    OptimizerInfo(
        "came_8bit",
        "Bias-corrected CAME at the user's learning rate, with the momentum in 8 bits.",
        {"self_tuning": False},
        papers=(_CAME,),
    ),
    OptimizerInfo(
        "came",
        "Bias-corrected CAME at the user's learning rate, with states in fp32.",
        {"self_tuning": False, "quantize_states": False},
        papers=(_CAME,),
    ),
):
    register_optimizer(_info)
