"""The algorithm as a readable list: a config becomes a chain of transforms."""

from ..config import AutomagicConfig
from ..transforms.cautious import Cautious
from ..transforms.confidence import Confidence
from ..transforms.core import Transform
from ..transforms.decay import CautiousWeightDecay, DecoupledWeightDecay, SelectiveWeightDecay
from ..transforms.lora import ScaleByRowGain
from ..transforms.momentum import Momentum, MultiScaleMomentum
from ..transforms.second_moment import ClipByRMS, FactoredSecondMoment, FullSecondMoment
from ..transforms.self_tuning import MeasureAgreement, ScaleByElementRate, ScaleByRate, VoteOnElements
from ..transforms.spatial import (
    DampBackground,
    Kernel,
    PenaliseFrequencies,
    SuppressEdges,
    WeightRowsByVariance,
    spatial_axes,
)

Chain = tuple[Transform, ...]


def build_chain(
    config: AutomagicConfig, is_matrix: bool, shape: tuple[int, ...] = (), is_full_weight: bool = False
) -> Chain:
    """Returns the chain of a parameter.

    Args:
        config: the options of its group.
        is_matrix: whether it has at least two rows and two columns; others keep a full second moment, no confidence.
        shape: its own shape; spatial terms act on axes that have neighbours.
        is_full_weight: whether it is a pretrained weight, whose origin is not zero.
    """
    return (
        *_direction(config, is_matrix),
        *_space(config, shape),
        *((ScaleByRowGain(),) if config.allora else ()),
        *((Cautious(),) if config.cautious else ()),
        *_write(config, is_full_weight),
    )


def _direction(config: AutomagicConfig, is_matrix: bool) -> Chain:
    if config.momentum_order == "before":
        return _adam(config)
    if config.came_mode == "paper":
        return _came_of_the_paper(config, is_matrix)
    _, beta2, beta3 = config.betas
    steady = (Confidence(beta3, config.eps[1]),) if is_matrix else ()
    return (
        FactoredSecondMoment(beta2) if is_matrix and config.factored else FullSecondMoment(beta2),
        ClipByRMS(config.clip_threshold),
        *_watch(config),
        _momentum(config),
        *steady,
    )


def _momentum(config: AutomagicConfig, corrected: bool = True) -> Transform:
    beta1, scales = config.betas[0], config.momentum_scales
    return MultiScaleMomentum(beta1, scales, corrected) if len(scales) > 1 else Momentum(beta1, corrected)


def _watch(config: AutomagicConfig) -> Chain:
    """What compares the gradient with the momentum of the steps before."""
    pooled = (MeasureAgreement(),) if config.context or (config.self_tuning and config.lr_search) else ()
    if config.lr_granularity == "tensor" or not config.self_tuning:
        return pooled
    return (*pooled, VoteOnElements(config.betas[0], config.mask_band, config.sync_frequency))


def _space(config: AutomagicConfig, shape: tuple[int, ...]) -> Chain:
    """What needs neighbours; nothing for parameters whose rows and columns have no order."""
    kernel = Kernel(shape, spatial_axes(shape, config.spatial_axes))
    if not kernel.axes:
        return ()
    return (
        *((SuppressEdges(kernel, config.edge_penalty, config.edge_threshold),) if config.edge_suppression else ()),
        *((PenaliseFrequencies(kernel, config.frequency_penalty),) if config.frequency_penalty else ()),
        *((DampBackground(),) if config.background_regularization else ()),
        *((WeightRowsByVariance(config.betas[1], config.detail_preservation),) if config.spatial_awareness else ()),
    )


def _write(config: AutomagicConfig, is_full_weight: bool) -> Chain:
    """From a direction to a step in units of the weights."""
    elements = (ScaleByElementRate(),) if config.self_tuning and config.lr_granularity == "element" else ()
    return (*elements, ScaleByRate(), *_decay(config, is_full_weight))


def _decay(config: AutomagicConfig, is_full_weight: bool) -> Chain:
    if not config.weight_decay:
        return ()
    if config.weight_decay_mode == "selective":
        return (SelectiveWeightDecay(config.weight_decay, keeps_origin=is_full_weight),)
    decay = CautiousWeightDecay if config.weight_decay_mode == "cautious" else DecoupledWeightDecay
    return (decay(config.weight_decay),)


def _adam(config: AutomagicConfig) -> Chain:
    """Adam's own order, for comparison: the momentum of the raw gradient over the root of its second moment."""
    return (_momentum(config), FullSecondMoment(config.betas[1], root_eps=config.eps[2]))


def _came_of_the_paper(config: AutomagicConfig, is_matrix: bool) -> Chain:
    """CAME as published (arXiv 2307.02047, algorithm 2), for comparison."""
    _, beta2, beta3 = config.betas
    eps1, eps2, _ = config.eps
    moment = FactoredSecondMoment if is_matrix else FullSecondMoment
    steady = (Confidence(beta3, eps2, floor=0.0, corrected=False, clips=False),) if is_matrix else ()
    return (
        moment(beta2, eps=eps1, corrected=False),
        ClipByRMS(config.clip_threshold),
        _momentum(config, corrected=False),
        *steady,
    )
