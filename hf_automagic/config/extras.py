"""Options of what is off by default: the context controller, LoRA pairs, spatial terms."""

import dataclasses

from ..options import option


@dataclasses.dataclass(frozen=True)
class ContextOptions:
    """Options of the context controller, the project's own heuristic."""

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


@dataclasses.dataclass(frozen=True)
class PairOptions:
    """Options that act on LoRA pairs; without pairs they change nothing."""

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


@dataclasses.dataclass(frozen=True)
class SpatialOptions:
    """Options that act on convolution kernels of three taps or more and on declared axes, and nowhere else."""

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
