"""Options of every step: the rate, the moments, the decay and how weights are written."""

import dataclasses
import math
from typing import Literal

from ..options import option


@dataclasses.dataclass(frozen=True)
class StepOptions:
    """Options that shape every step."""

    # the rate
    lr: float = option(
        5e-5,
        "The plain rate where self_tuning is off, and where lr_search starts. Otherwise it has no effect: what a "
        "scheduler does to it multiplies the tuned rate, its height does not matter.",
        low=0,
    )
    min_lr: float = option(1e-7, "Lower rail of the rate in lr_search.", low=0)
    max_lr: float = option(
        1e-3,
        "The tuned rate, in lr_search its upper rail, of parameters about which nothing is known, and of a "
        "model whose values show that nobody has trained it. B of a LoRA gets 2.4 times as much, new modules 3.4 "
        "times, A and pretrained weights 0.3 times, models wider than 384 less (`optim.roles`). Raise it for a task "
        "that learns too slowly; lower it when a run diverges.",
        low=0,
    )
    rail_steps: int = option(
        100,
        "After so many steps the tuned rate falls as 1 / sqrt(steps), as AdaGrad's does: long runs on little data "
        "memorise less. New modules and models from scratch fall after half of it. 0 keeps it up. Smaller falls "
        "earlier.",
        low=0,
    )
    self_tuning: bool = option(
        True, "The rate follows from a parameter's role, its model's width and the step; off, the rate is the user's."
    )
    lr_search: bool = option(
        False,
        "Starts at lr and climbs to the rail while gradients agree with the momentum; no task measured gained by it.",
    )
    lr_granularity: Literal["tensor", "element"] = option(
        "tensor",
        "'element' adds a bounded rate to every single weight (the seeds' lr_mask, one byte each) around the "
        "pooled rate.",
        choices=("tensor", "element"),
    )
    lr_pool: Literal["global", "group"] = option(
        "global",
        "In lr_search: which parameters share one search, all or those of a param group.",
        choices=("global", "group"),
    )
    lr_speed: float = option(
        0.3,
        "In lr_search: the change of the rate's logarithm in a step at full agreement of gradient and momentum; 0.3 "
        "crosses a decade in 8 steps, 5 with the drift. Larger arrives sooner and jitters more.",
        low=0,
        high=2.3,
    )
    lr_drift: float = option(
        0.5,
        "In lr_search: how readily the rate rises, what the agreement, from -1 to 1, is lifted by. 0 lets it wander "
        "where gradients tell nothing, which ended 3 to 10% higher on three tasks; 1 never lowers it.",
        low=0,
        high=1,
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
        "LoRA B steps at this multiple of what it would (LoRA+, arXiv 2402.12354). Its rail holds a ratio of 8 to A's "
        "already; where self_tuning is off, LoRA+ suggests 2 to 20.",
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
        low=1e-30,  # 0 divides zero by zero where a gradient is zero
    )
    clip_threshold: float = option(
        1.0,
        "The normalised gradient of a matrix is scaled down to this RMS (Adafactor, arXiv 1804.04235).",
        low=1e-3,
        high=math.inf,
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
        low=1e-9,
        high=math.inf,
    )
