"""The plan of a step: which parameters step together, and the tensors of the optimizer as a whole."""

import itertools
import logging
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..config import option_names
from ..quantization import QuantizationStrategy
from .bucket import Bucket
from .context import fit_context
from .events import new_events
from .fused import FusedStep, choose_backend
from .groups import group_config, is_stepped
from .guard import new_counters
from .pairs import PairView
from .storage import codecs_of_group

logger = logging.getLogger(__name__)


class Plan:
    """The buckets of some param groups, and the pairs that lie in them; made anew where groups or options change.

    Args:
        groups: filled param groups.
        strategy: decides what is stored in few bits, None for the options alone.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], strategy: QuantizationStrategy | None) -> None:
        """Sorts the parameters into buckets; allocates nothing."""
        self.options = [_options(group) for group in groups]
        self.seen = _look_at_params(groups)
        self.adopted: list[Tensor] | None = None
        self.buckets = _sort_into_buckets(groups, strategy)
        self.pairs = PairView(groups, self.buckets)
        device = shared_device(groups)
        self.backends = [choose_backend(bucket, device) for _, bucket in self.buckets]
        for (name, _), (_, bucket) in zip(self.backends, self.buckets, strict=True):
            if name == "compile":
                bucket.compile()
        fused = [number for number, (name, _) in enumerate(self.backends) if name == "triton"]
        self.fused = FusedStep(groups, self.buckets, self.pairs, fused) if fused else None

    def is_current(self, groups: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the groups still hold the same parameters, of the same kind, with the same options."""
        return self.options == [_options(group) for group in groups] and self.seen == _look_at_params(groups)

    def adopt(self, state: Mapping[Tensor, dict[str, Tensor]]) -> None:
        """Takes over what was put into `optimizer.state`, converted where it was stored in another way."""
        entries = itertools.chain.from_iterable(map(dict.values, state.values()))
        count = sum(map(len, state.values()))
        if self.adopted and len(self.adopted) == count and all(map(operator.is_, entries, self.adopted)):
            return
        converted = sum(bucket.adopt([state[p] for p in bucket.params]) for _, bucket in self.buckets)
        if converted:
            logger.info("the states of %d parameters were stored in another way and have been converted", converted)
        self.adopted = list(itertools.chain.from_iterable(map(dict.values, state.values())))


def _look_at_params(groups: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Returns what decides about the sorting into buckets, cheap to take and to compare."""
    every = [p for group in groups for p in group["params"]]
    stepped = [p.requires_grad or p.grad is not None for p in every]
    return [list(map(id, every)), stepped, [p.dtype for p in every], [p.device for p in every]]


def _options(group: Mapping[str, Any]) -> list[Any]:
    """Returns what decides about a group's chain and storage: all options but the rate, which schedulers change."""
    return [group[name] for name in option_names() if name != "lr"]


def _sort_into_buckets(
    groups: Sequence[Mapping[str, Any]], strategy: QuantizationStrategy | None
) -> list[tuple[int, Bucket]]:
    """Returns (number of the group, bucket), in the order of the parameters."""
    kinds: dict[Any, tuple[list[Tensor], list[int]]] = {}
    position = 0
    for index, group in enumerate(groups):
        for param, codecs in zip(group["params"], codecs_of_group(group, strategy), strict=True):
            if is_stepped(param):
                kind = (index, codecs, param.shape, param.dtype, param.device)
                params, positions = kinds.setdefault(kind, ([], []))
                params.append(param)
                positions.append(position)
            position += 1
    return [
        (index, Bucket(params, positions, group_config(groups[index]), codecs, groups[index]["is_full_weight"]))
        for (index, codecs, *_), (params, positions) in kinds.items()
    ]


def shared_device(groups: Sequence[Mapping[str, Any]]) -> torch.device:
    """Says where counters, events, context and rates live: with the first parameter."""
    return next((group["params"][0].device for group in groups if group["params"]), torch.device("cpu"))


def prepare_shared(groups: Sequence[dict[str, Any]]) -> None:
    """Creates what belongs to the optimizer as a whole, or brings it to its device after a load.

    Every group has its `log_rate` and `update_rms`; the first one also keeps the counters, the events and the context.
    """
    device = shared_device(groups)
    for group in groups:
        for name in ("log_rate", "update_rms"):
            group[name] = group.setdefault(name, torch.zeros((), device=device)).to(device)
    for name, make in (("counters", new_counters), ("events", new_events)):
        kept = groups[0].get(name) or make(device)
        groups[0][name] = {key: tensor.to(device) for key, tensor in kept.items()}
    if any(group["context"] for group in groups):
        fit_context(groups[0], device)
