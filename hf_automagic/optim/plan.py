"""The plan of a step: which parameters step together, and the tensors of the optimizer as a whole."""

import functools
import logging
import operator
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..config import option_names
from ..quantization import QuantizationStrategy
from .attach import SHARED
from .bucket import Bucket
from .compiled_bucket import CompiledBucket
from .context import fit_context
from .distributed import RankSums, find_shard, refuse_flat_shards
from .events import new_events
from .fused import FusedStep, choose_backend, give_up_triton, is_of_compiler
from .groups import check_members, group_config, is_stepped, parameter_names
from .guard import new_counters
from .pairs import PairView, check_aligned
from .sharded_bucket import ShardedBucket, step_together
from .storage import codecs_of_group
from .sweep import StepInputs, Sweep
from .tuning import BucketSums
from .watched_state import StateWatch, WatchedState, are_same

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
        self.members, self.kinds = _members(groups), _kinds(groups)
        self.watch = StateWatch()
        refuse_flat_shards(groups)
        for group in groups:
            check_aligned(group)
        buckets, self.ranks = _sort_into_buckets(groups, strategy)
        self.is_spread = any(bucket.is_spread for _, bucket in buckets)
        device = shared_device(groups)
        self.backends = [choose_backend(bucket, device, self.is_spread) for _, bucket in buckets]
        self.buckets = [
            (index, CompiledBucket.of(bucket) if name == "compile" else bucket)
            for (name, _), (index, bucket) in zip(self.backends, buckets, strict=True)
        ]
        self.pairs = PairView(groups, self.buckets)
        fused = [number for number, (name, _) in enumerate(self.backends) if name == "triton"]
        self.fused = FusedStep(groups, self.buckets, self.pairs, fused) if fused else None

    def is_current(self, groups: Sequence[Mapping[str, Any]], are_all_stepped: bool = False) -> bool:
        """Whether the groups still hold the same parameters, of the same kind, with the same options.

        Args:
            groups: the optimizer's.
            are_all_stepped: what spares a look at each, as where every parameter has a gradient.
        """
        members = _members(groups, are_all_stepped)
        if self.options != [_options(group) for group in groups] or self.members[1:] != members[1:]:
            return False
        if not are_same(self.members[0], members[0]):
            return False
        if self.fused is not None and self.fused.tables_hold() and not self.fused.others:
            return True  # weights that lie where they did are of the same kind
        return self.kinds == _kinds(groups)

    def adopt(self, state: MutableMapping[Tensor, dict[str, Tensor]]) -> None:
        """Takes over what was put into `optimizer.state`, converted where it was stored in another way."""
        if self.watch.holds(state):
            return
        for _, bucket in self.buckets:
            for p in bucket.params:
                if p not in state:
                    state[p] = WatchedState()
        converted = sum(bucket.adopt([state[p] for p in bucket.params]) for _, bucket in self.buckets)
        if converted:
            logger.info("the states of %d parameters were stored in another way and have been converted", converted)
        self.watch.begin(state)

    def fused_stages(self, state: MutableMapping[Tensor, dict[str, Tensor]], *told: Any) -> list[Callable[[], None]]:
        """Returns a step through the kernels, see `FusedStep.stages`; states are adopted while they look.

        None of it is left where triton cannot compile them: then, and from then on, all buckets step eagerly.
        """
        assert self.fused is not None
        if not self.watch.entries:
            self.adopt(state)
        try:
            look, *rest = self.fused.stages(*told)
        except Exception as error:  # triton's own have no base that could be named without it
            if not is_of_compiler(error):
                raise
            reason = give_up_triton(error)
            for number in self.fused.fused:
                self.buckets[number][1].refusal = reason
            self.fused = None
            return []
        return [look, functools.partial(self.adopt, state), *rest]

    def step(self, inputs: Sequence[StepInputs], sweeps: Sequence[list[Sweep]]) -> list[BucketSums]:
        """Steps all buckets with what the step hands to each; returns what each measured.

        Args:
            inputs: one for each bucket.
            sweeps: how far the chunks of each bucket have come, kept up to date; see `Bucket.step`.
        """
        found = step_together([bucket for _, bucket in self.buckets], inputs, sweeps, self.ranks)
        return [
            BucketSums(index, *sums, bucket.numel_with_grad())
            for (index, bucket), sums in zip(self.buckets, found, strict=True)
        ]


def _members(
    groups: Sequence[Mapping[str, Any]], are_all_stepped: bool = False
) -> tuple[list[Tensor], list[int], list[bool]]:
    """Returns which parameters there are, how large, and which of them step; cheap to take and to compare."""
    every = [p for group in groups for p in group["params"]]
    stepped = [True] * len(every) if are_all_stepped else list(map(operator.attrgetter("requires_grad"), every))
    if not all(stepped):
        stepped = [is_stepped(p) for p in every]
    return every, list(map(Tensor.numel, every)), stepped


def _kinds(groups: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Returns what decides about the sorting into buckets."""
    return [(p.shape, p.dtype, p.device) for group in groups for p in group["params"]]


def _options(group: Mapping[str, Any]) -> list[Any]:
    """Returns what decides about a group's chain and storage: all options but the rate, which schedulers change."""
    return [group[name] for name in option_names() if name != "lr"]


def _sort_into_buckets(
    groups: Sequence[Mapping[str, Any]], strategy: QuantizationStrategy | None
) -> tuple[list[tuple[int, Bucket]], RankSums | None]:
    """Returns (number of the group, bucket), in the order of the parameters, and what adds up over their ranks."""
    kinds: dict[Any, tuple[list[Tensor], list[int]]] = {}
    position, names = 0, parameter_names(groups)
    for index, group in enumerate(groups):
        check_members(group)  # what has been unfrozen since, too
        for param, codecs in zip(group["params"], codecs_of_group(group, strategy), strict=True):
            if is_stepped(param):
                shard = find_shard(param, names[position])
                kind = (index, codecs, shard, param.shape, param.dtype, param.device)
                params, positions = kinds.setdefault(kind, ([], []))
                params.append(param)
                positions.append(position)
            position += 1
    ranks = RankSums.among([params[0] for params, _ in kinds.values()], [shard for _, _, shard, *_ in kinds])
    buckets = []
    for (index, codecs, shard, *_), (params, positions) in kinds.items():
        told = (params, positions, group_config(groups[index]), codecs, groups[index]["is_full_weight"])
        buckets.append((index, Bucket(*told) if shard is None else ShardedBucket(shard, ranks, *told)))
    return buckets, ranks


def shared_device(groups: Sequence[Mapping[str, Any]]) -> torch.device:
    """Says where counters, events, context and rates live: with the first parameter."""
    return next((group["params"][0].device for group in groups if group["params"]), torch.device("cpu"))


def prepare_shared(groups: Sequence[dict[str, Any]]) -> None:
    """Creates what belongs to the optimizer as a whole, or brings it to its device after a load.

    Every group has its `log_rate` and `update_rms`; the first one also keeps the counters, the events and the context.
    """
    device = shared_device(groups)
    for name in SHARED:  # the first group may have been another
        owner = next((group for group in groups if name in group), groups[0])
        if owner is not groups[0]:
            groups[0][name] = owner.pop(name)
    for group in groups:
        for name in ("log_rate", "update_rms"):
            group[name] = group.setdefault(name, torch.zeros((), device=device)).to(device)
    for name, make in (("counters", new_counters), ("events", new_events)):
        kept = groups[0].get(name) or make(device)
        groups[0][name] = {key: tensor.to(device) for key, tensor in kept.items()}
    if any(group["context"] for group in groups):
        fit_context(groups[0], device)
