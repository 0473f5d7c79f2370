"""Every option of the optimizers: default, unit, bounds and meaning, stated once."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal

from .options import check_bounds, describe_options, option, parse_value, unknown_name_error

# How states lie in memory. These may change in the middle of a run; when a checkpoint is loaded, the optimizer's own
# win.
STORAGE_OPTIONS = (
    "quantize_states",
    "codec",
    "block_size",
    "error_correction",
    "vector_precision",
    "min_8bit_size",
    "mixed_precision",
    "embeddings_in_fp32",
    "adaptive_block_size",
    "min_block_size",
    "max_block_size",
    "block_error_target",
    "storage_overrides",
    "strict",
)

# Bytes of state an element, on Llama-3-8B's LoRA of rank 16 over all linear layers and on a 1.1B model's full weights:
# conservative 3.07 and 2.52, balanced 2.57 and 2.02, aggressive 1.32 and 1.02. Adam has 8.
PRESETS: dict[str, dict[str, Any]] = {
    "conservative": {"lr_granularity": "element", "error_correction": True},
    "balanced": {"lr_granularity": "element"},
    "aggressive": {"vector_precision": "log16"},
}


@dataclasses.dataclass(frozen=True)
class AutomagicConfig:
    """Holds the options of one optimizer; the defaults are those of `optim="automagic_8bit"`.

    Options may be set for the whole optimizer or, as keys of a param group, for one group.

    Options:
    """

    # the rate
    lr: float = option(
        5e-5, "Where the search for the learning rate starts; the plain rate where self_tuning is off.", low=0
    )
    min_lr: float = option(1e-7, "Lower rail of the tuned rate of adapters and new modules.", low=0)
    max_lr: float = option(
        1e-3,
        "Upper rail of the tuned rate of adapters and new modules. Raise it for a task that still improves at "
        "the rail; lower it when a run diverges.",
        low=0,
    )
    full_weight_lr_scale: float = option(
        0.1,
        "Full weights and embeddings use both rails times this: a full fine-tune wants about a tenth of a "
        "LoRA's rate.",
        low=0,
    )
    self_tuning: bool = option(True, "Tunes the rate between the rails; off, the rate is the user's.")
    lr_granularity: Literal["tensor", "element"] = option(
        "tensor",
        "'element' adds a bounded rate to every single weight (the seeds' lr_mask, one byte each) around the "
        "pooled rate.",
        choices=("tensor", "element"),
    )
    lr_pool: Literal["global", "group"] = option(
        "global", "Which parameters share one tuned rate: all, or those of a param group.", choices=("global", "group")
    )
    lr_speed: float = option(
        0.3,
        "Largest change of the tuned rate's logarithm in a step: 0.3 crosses a decade in 8 steps. Larger "
        "arrives sooner and jitters more.",
        low=0,
        high=2.3,
    )
    mask_band: float = option(4.0, "An element's rate stays within this factor of the pooled rate.", low=1, high=1e4)
    sync_frequency: int = option(
        100,
        "Every so many steps the element rates are re-centred around the pooled rate, error_correction drops "
        "its residual, and adaptive_block_size measures.",
        low=1,
    )
    loraplus_lr_ratio: float = option(
        1.0,
        "LoRA B steps at this multiple of A's rate and upper rail (LoRA+, arXiv 2402.12354, suggests 2 to 20).",
        low=1e-3,
    )
    warmup_steps: int = option(
        0, "The rate grows linearly over these first steps; leave 0 where a scheduler warms up.", low=0
    )

    # moments
    betas: tuple[float, float, float] = option(
        (0.8, 0.99, 0.999),
        "Decay of the momentum, of the second moment and of the confidence (CAME, arXiv 2307.02047). Larger "
        "averages longer and steps shorter on noise; 0.9, 0.999, 0.9999 ended 5% higher on two LoRA tasks at "
        "the same rail.",
        low=0,
        high=1 - 2**-24,
    )
    eps: tuple[float, float, float] = option(
        (1e-30, 1e-16, 1e-8),
        "Floors: of the squared gradient (only came_mode='paper'), of the squared residual, of Adam's denominator "
        "(only momentum_order='before').",
        low=0,
    )
    clip_threshold: float = option(
        1.0, "The normalised gradient of a matrix is scaled down to this RMS (Adafactor, arXiv 1804.04235).", low=1e-3
    )
    momentum_scales: tuple[int, ...] = option(
        (),
        "Follows momenta of several horizons, in units of the first, which is 1: 1:5:10:25 is the second seed's. Each "
        "one more costs a momentum's bytes. More of them steady the direction, longer ones look further back; a scale "
        "k weighs 1/k.",
        low=1,
        high=1000,
    )
    factored: bool = option(
        True, "Stores the second moment of a matrix as row and column means; off, per element (8 times the bytes)."
    )
    came_mode: Literal["stable", "paper"] = option(
        "stable",
        "'paper' is CAME as published, without bias corrections and with a first step of 11 times the rate; "
        "for comparison.",
        choices=("stable", "paper"),
    )
    momentum_order: Literal["after", "before"] = option(
        "after",
        "'after' averages the normalised gradient, 'before' the raw one, as Adam does; for comparison.",
        choices=("after", "before"),
    )

    cautious: bool = option(
        False,
        "Drops elements whose direction opposes the gradient and enlarges the others for it (Cautious Optimizers, "
        "arXiv 2411.16085); steps are about 1.36 times as long.",
    )

    # the context: the project's own heuristic
    context: bool = option(
        False,
        "Watches the losses and the gradients' consistency, and multiplies the rate by 0.5 to 2: down after a "
        "loss spike, a reversal or a non-finite gradient, up while the loss falls and steps agree.",
    )
    context_window: int = option(
        100,
        "Losses remembered by context, and the horizon of its consistency, in steps; losses count from the "
        "21st on. Larger averages the consistency longer and notices a changed trend later.",
        low=21,
        high=100_000,
    )
    edge_case_threshold: float = option(
        0.95,
        "Instability from which on context takes a step for an edge case and halves the rate; 0.95 is a loss "
        "7.5 spreads too high. Smaller is more sensitive.",
        low=0,
        high=1,
    )
    adaptation_rate: float = option(
        0.1,
        "Share of the way that context's multiplier goes to its target in a step. Larger reacts faster.",
        low=0,
        high=1,
    )

    # LoRA pairs: without them these change nothing
    allora: bool = option(
        False,
        "Damps the rows of a LoRA's product B A that have grown, by 1 / sqrt(1 + eta^2 |row|) (ALLoRA, arXiv "
        "2410.09692).",
    )
    eta: float = option(2.0, "Strength of allora. Larger damps grown rows more; 0 does nothing.", low=0, high=1e3)
    lora_rank_penalty: bool = option(
        False, "Shrinks the singular values of each LoRA's product B A, apart from the gradient, to lower its rank."
    )
    rank_penalty_strength: float = option(
        0.01, "Share of an average singular value lost per unit of rate and step. Larger lowers the rank more.", low=0
    )
    low_rank_emphasis: float = option(
        1.2,
        "Which singular values shrink: 1 all by the same share (decay of B A), 2 all by the same amount (nuclear "
        "norm); larger spares the large ones more.",
        low=1,
        high=3,
    )
    rank_penalty_every: int = option(
        10,
        "Steps between two shrinkings, each of which does the work of all of them. Smaller is smoother and costs "
        "time.",
        low=1,
    )

    # spatial terms: they act on convolution kernels of three taps or more and on declared axes, and nowhere else
    edge_suppression: bool = option(
        False, "Smooths the direction where it is rough along spatial axes (LSGD, arXiv 1806.06317)."
    )
    edge_penalty: float = option(0.1, "Strength of edge_suppression, in squared taps. Larger is smoother.", low=0)
    edge_threshold: float = option(
        0.6,
        "Roughness |Laplacian(d)| / |d| above which edge_suppression acts; white noise has 2.4 along one axis, 4.5 "
        "along two. Smaller acts more often.",
        low=0,
    )
    frequency_penalty: float = option(
        0.0, "Damps fast variation along spatial axes: 1 halves what alternates from tap to tap; 0 is off.", low=0
    )
    background_regularization: bool = option(
        False,
        "Shortens the steps of filters whose signal-to-noise ratio is low among those of their layer, by half at "
        "most.",
    )
    spatial_awareness: bool = option(
        False,
        "Steps calm filters faster than torn ones, by the gradient's variance within each, from half to twice the "
        "rate.",
    )
    detail_preservation: float = option(
        0.8, "How little spatial_awareness changes: 1 nothing, 0 all that it can.", low=0, high=1
    )
    spatial_axes: tuple[int, ...] = option(
        (),
        "Axes of a parameter that have neighbours, counted from 0: 0 for a table of positions, 2 for a "
        "one-dimensional kernel. Belongs into the param group of such parameters. Empty: axes 2, 3, ... of parameters "
        "with four axes or more.",
        low=0,
    )

    # decay and write
    weight_decay: float = option(
        0.0,
        "Decoupled weight decay: a weight shrinks by rate times this each step. None on biases, norms, magnitudes.",
        low=0,
    )
    weight_decay_mode: Literal["decoupled", "cautious", "selective"] = option(
        "decoupled",
        "'cautious' decays only weights that the step does not push away from zero (arXiv 2510.12402); "
        "'selective' pulls a tensor back to its origin only while it drifts away against the gradient (arXiv "
        "2411.01713) and wants a weight_decay near 1. An adapter's origin is zero; that of a full weight is "
        "kept, 4 bytes an element.",
        choices=("decoupled", "cautious", "selective"),
    )
    stochastic_rounding: bool = option(
        True, "Writes bf16 and fp16 weights by unbiased rounding, so that steps below their resolution are not lost."
    )
    seed: int = option(
        0, "Seed of the rounding's counter-based generator; equal seeds give equal bits.", low=0, high=2**31 - 1
    )
    max_grad_norm: float | None = option(
        None,
        "Clips the gradients of all parameters to this total L2 norm inside the step; the trainer's must be off.",
        low=0,
    )

    # storage
    quantize_states: bool = option(
        True, "Stores momenta in 8 bits, and in 16 bits the vectors that vector_precision says."
    )
    codec: str = option(
        "softsign",
        "The 8-bit code of the momenta: softsign; affine, the first seed's; dynamic, bitsandbytes'; or a "
        "registered one.",
    )
    block_size: int = option(
        128,
        "Elements of a row that share one scale, a power of two. Smaller is more exact and costs 2 / "
        "block_size bytes an element.",
        low=32,
        high=4096,
    )
    error_correction: bool = option(
        False,
        "Keeps what rounding takes from a momentum in 4 more bits and gives it back in the next step: a tenth "
        "of the error for half a byte an element.",
    )
    vector_precision: Literal["auto", "fp32", "log16"] = option(
        "auto",
        "How row and column averages are stored: 'log16' halves their bytes, 'auto' does so where a matrix has"
        " fewer than 16 rows or columns, so that they weigh.",
        choices=("auto", "fp32", "log16"),
    )
    min_8bit_size: int = option(4096, "Parameters with fewer elements keep their states in fp32.", low=0)
    mixed_precision: bool = option(
        True, "Keeps the states of small parameters in fp32; off, all matrices are quantised, whatever their size."
    )
    embeddings_in_fp32: bool = option(
        False,
        "Keeps the states of embeddings in fp32, as the Trainer makes bitsandbytes do; that is for a second "
        "moment in 8 bits, which there is none of here.",
    )
    adaptive_block_size: bool = option(
        False,
        "Gives each matrix the largest block whose measured rounding error is below block_error_target, anew "
        "every sync_frequency steps; that reads the device.",
    )
    min_block_size: int = option(
        64, "Smallest block that adaptive_block_size may choose, a power of two.", low=32, high=4096
    )
    max_block_size: int = option(
        1024, "Largest block that adaptive_block_size may choose, a power of two.", low=32, high=4096
    )
    block_error_target: float = option(
        0.007,
        "Relative L2 error of a momentum that adaptive_block_size accepts. Smaller chooses smaller blocks.",
        low=0,
        high=1,
    )
    storage_overrides: Mapping[str, Mapping[str, Any]] | None = option(
        None,
        "Storage options for parameters whose names match a pattern with wildcards: {'*.lm_head.*': "
        "{'quantize_states': False}}.",
    )
    strict: bool = option(
        False, "Raises where a codec cannot run, instead of keeping these states in fp32 and saying so."
    )

    def __post_init__(self) -> None:
        """Checks every bound and the relations between options."""
        for name in ("betas", "eps"):
            value = getattr(self, name)
            object.__setattr__(self, name, tuple(value))
            if len(value) != 3:
                raise ValueError(f"{name} must hold three numbers, got {value!r}")
        for name in ("momentum_scales", "spatial_axes"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        check_bounds(self)
        self._check_whole_numbers("momentum_scales")
        self._check_whole_numbers("spatial_axes")
        if self.momentum_scales and 1 not in self.momentum_scales:
            raise ValueError(
                f"momentum_scales must hold 1, the momentum that the others extend, got {self.momentum_scales!r}"
            )
        self._check_storage()
        if self.min_lr > self.max_lr:
            raise ValueError(f"min_lr must not exceed max_lr, got {self.min_lr!r} and {self.max_lr!r}")
        if self.context and (self.came_mode, self.momentum_order) != ("stable", "after"):
            raise ValueError(
                f"context needs came_mode 'stable' and momentum_order 'after', got {self.came_mode!r} and "
                f"{self.momentum_order!r}: the modes for comparison measure no consistency; turn context off"
            )

    def _check_storage(self) -> None:
        for name in ("block_size", "min_block_size", "max_block_size"):
            size = getattr(self, name)
            if size != int(size) or int(size) & (int(size) - 1):
                raise ValueError(f"{name} must be a power of two from 32 to 4096, got {size}")
        if self.min_block_size > self.max_block_size:
            raise ValueError(
                f"min_block_size must not exceed max_block_size, got {self.min_block_size} and {self.max_block_size}"
            )
        overrides = {} if self.storage_overrides is None else self.storage_overrides
        if not (
            isinstance(overrides, Mapping) and all(isinstance(changes, Mapping) for changes in overrides.values())
        ):
            raise ValueError(
                f"storage_overrides must map name patterns to storage options, got {overrides!r}; write "
                "{'*.lm_head.*': {'quantize_states': False}}"
            )
        for name in (name for changes in overrides.values() for name in changes):
            if name not in STORAGE_OPTIONS or name == "storage_overrides":
                raise unknown_name_error("storage option", name, STORAGE_OPTIONS)

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
        if name not in PRESETS:
            raise unknown_name_error("preset", name, PRESETS)
        return make_config({**PRESETS[name], **changes})

    def replace(self, **changes: Any) -> "AutomagicConfig":
        """Returns a copy with some options changed, checked anew."""
        return make_config({**dataclasses.asdict(self), **changes})


AutomagicConfig.__doc__ = (AutomagicConfig.__doc__ or "").rstrip() + "\n" + describe_options(AutomagicConfig)


@functools.cache
def option_names() -> tuple[str, ...]:
    """Returns the names of all options, in order."""
    return tuple(field.name for field in dataclasses.fields(AutomagicConfig))


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
