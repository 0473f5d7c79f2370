"""What a user should hear once: options that are on and find nothing to act on."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from ..transforms.spatial import spatial_axes

logger = logging.getLogger(__name__)

PAIR_OPTIONS = ("allora", "lora_rank_penalty")
SPATIAL_OPTIONS = ("edge_suppression", "frequency_penalty", "background_regularization", "spatial_awareness")


def tell_inert_options(groups: Sequence[Mapping[str, Any]]) -> None:
    """Says where LoRA and spatial options act; elsewhere they change nothing."""
    pairs = {pair for group in groups for pair in group.get("pairs", ()) if pair >= 0}
    wanted = _switched_on(groups, PAIR_OPTIONS)
    if wanted and pairs:
        logger.info("%s: on %d LoRA pairs", wanted, len(pairs))
    elif wanted and any("pairs" in group for group in groups):
        logger.info("%s: no LoRA pairs found, nothing changes", wanted)
    elif wanted:
        logger.warning(
            "%s: off, no LoRA pairs found among bare parameters; optimizer.attach(model) turns them on", wanted
        )
    wanted = _switched_on(groups, SPATIAL_OPTIONS)
    if wanted:
        shapes = [(tuple(p.shape), group["spatial_axes"]) for group in groups for p in group["params"]]
        count = sum(bool(spatial_axes(*shape)) for shape in shapes)
        logger.info(
            "%s: on %d of %d parameters, those with convolution taps or declared spatial_axes; the rest have no axis "
            "with neighbours and step as without",
            wanted,
            count,
            len(shapes),
        )


def _switched_on(groups: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    return ", ".join(name for name in names if any(group[name] for group in groups))
