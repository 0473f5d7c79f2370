"""Every option of the optimizers: default, unit, bounds and meaning, stated once."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from ..options import check_bounds, describe_options, parse_value, unknown_name_error
from .extras import ContextOptions, PairOptions, SpatialOptions
from .step import StepOptions
from .storage import StorageOptions, storage_option_names

__all__ = [
    "PRESETS",
    "AutomagicConfig",
    "StorageOptions",
    "make_config",
    "option_names",
    "parse_option",
    "preset_options",
    "storage_option_names",
]

# Bytes of state an element, on Llama-3-8B's LoRA of rank 16 over all linear layers and on a 1.1B model's full weights:
# conservative 3.07 and 2.52, balanced 2.57 and 2.02, aggressive 1.32 and 1.02. Adam has 8.
PRESETS: dict[str, dict[str, Any]] = {
    "conservative": {"lr_granularity": "element", "error_correction": True},
    "balanced": {"lr_granularity": "element"},
    "aggressive": {"vector_precision": "log16"},
}


@dataclasses.dataclass(frozen=True)
class AutomagicConfig(StorageOptions, SpatialOptions, PairOptions, ContextOptions, StepOptions):
    """Holds the options of one optimizer; the defaults are those of `optim="automagic_8bit"`.

    Options may be set for the whole optimizer or, as keys of a param group, for one group. They are declared by
    subject in the bases, whose fields come in the reverse of the order above.

    Options:
    """

    def __post_init__(self) -> None:
        """Checks every bound and the relations between options."""
        for name in ("betas", "eps", "momentum_scales", "spatial_axes"):
            value = getattr(self, name)
            if not isinstance(value, (tuple, list)):
                raise TypeError(f"{name} must be a tuple of numbers, got {value!r}")
            object.__setattr__(self, name, tuple(value))
        for name in ("betas", "eps"):
            value = getattr(self, name)
            if len(value) != 3:
                raise ValueError(f"{name} must hold three numbers, got {value!r}")
        check_bounds(self)
        self._check_whole_numbers("momentum_scales")
        self._check_whole_numbers("spatial_axes")
        if self.momentum_scales and 1 not in self.momentum_scales:
            raise ValueError(
                f"momentum_scales must hold 1, the momentum that the others extend, got {self.momentum_scales!r}"
            )
        self.check_storage()
        if self.min_lr > self.max_lr:
            raise ValueError(f"min_lr must not exceed max_lr, got {self.min_lr!r} and {self.max_lr!r}")
        if (self.came_mode, self.momentum_order) != ("stable", "after"):
            self._check_comparison()

    def _check_comparison(self) -> None:
        modes = f"came_mode 'stable' and momentum_order 'after', got {self.came_mode!r} and {self.momentum_order!r}"
        if self.came_mode == "paper" and not self.betas[0]:
            raise ValueError(
                f"came_mode 'paper' needs a first beta above 0, got betas {self.betas!r}: with 0 its residual is "
                "zero, and it divides by that; use came_mode 'stable'"
            )
        if self.context:
            raise ValueError(
                f"context needs {modes}: the modes for comparison measure no consistency; turn context off"
            )
        if self.self_tuning and self.lr_granularity == "element":
            raise ValueError(
                f"lr_granularity 'element' needs {modes}: the modes for comparison take no votes; turn self_tuning off"
            )

    def _check_whole_numbers(self, name: str) -> None:
        value = getattr(self, name)
        if any(number != int(number) for number in value) or len(set(value)) != len(value):
            raise ValueError(f"{name} must hold different whole numbers, got {value!r}")
        object.__setattr__(self, name, tuple(int(number) for number in value))

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "AutomagicConfig":
        """Returns the options of a preset of `PRESETS`, with some changed.

        Raises:
            TypeError: there is no such preset or option; the nearest name is given.
        """
        return make_config({**preset_options(name), **changes})

    def replace(self, **changes: Any) -> "AutomagicConfig":
        """Returns a copy with some options changed, checked anew."""
        return make_config({**dataclasses.asdict(self), **changes})


AutomagicConfig.__doc__ = (AutomagicConfig.__doc__ or "").rstrip() + "\n" + describe_options(AutomagicConfig)


@functools.cache
def option_names() -> tuple[str, ...]:
    """Returns the names of all options, in order."""
    return tuple(field.name for field in dataclasses.fields(AutomagicConfig))


def preset_options(name: str | None) -> dict[str, Any]:
    """Returns the options of a preset of `PRESETS`, none without a name.

    Raises:
        TypeError: there is no such preset; the nearest name is given.
    """
    if name is not None and name not in PRESETS:
        raise unknown_name_error("preset", name, PRESETS)
    return {} if name is None else dict(PRESETS[name])


def make_config(options: Mapping[str, Any]) -> AutomagicConfig:
    """Builds a checked config from a mapping of options.

    Raises:
        TypeError: an option does not exist; the nearest name is given.
        ValueError: a value is outside its bounds.
    """
    for name in options:
        if name not in option_names():
            raise unknown_name_error("option", name, option_names())
    return AutomagicConfig(**options)


def parse_option(name: str, text: str) -> Any:
    """Parses one option's text by its declared type; see `options.parse_value`."""
    return parse_value(AutomagicConfig, name, text)
