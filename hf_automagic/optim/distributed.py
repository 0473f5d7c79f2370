"""Distributed: which rows of a parameter a rank holds, and the one way in which sums cross ranks.

Under DDP every rank sees the same averaged gradients and takes the same step; only the context's loss is averaged, see
`losses.py`. Under FSDP2 a parameter is a DTensor whose rows lie on several ranks, and its states lie with them.
"""

import dataclasses
import functools
import logging
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .groups import is_stepped, parameter_names

logger = logging.getLogger(__name__)

ZERO = "deepspeed.runtime.zero"
PER_PARAMETER_TELLS = ("pairs", "param_names", "names")  # as long as the group, unless somebody made it flat


@dataclasses.dataclass(frozen=True)
class Shard:
    """The rows of a parameter that this rank holds.

    Args:
        axis: of the mesh along which the rows are cut, None where all of them are here.
        ranks: who shares the parameter's rows, this rank among them.
        first_row: where the rows begin.
        rows: how many there are, 0 on the last ranks of a small parameter.
    """

    axis: int | None
    ranks: tuple[int, ...]
    first_row: int
    rows: int


def find_shard(param: Tensor, name: str) -> Shard | None:
    """Returns which rows of a DTensor lie here, None for a plain tensor.

    Raises:
        ValueError: it is sharded otherwise than by its first axis, as by tensor parallelism, or is offloaded.
    """
    placements, mesh = getattr(param, "placements", None), getattr(param, "device_mesh", None)
    if placements is None or mesh is None:
        return None
    if param.device.type != mesh.device_type:  # torch would copy the states to the mesh's device
        raise ValueError(
            f"{name} lies on {param.device.type} and its mesh on {mesh.device_type}; Automagic steps parameters where "
            "they compute: use fully_shard without CPUOffloadPolicy"
        )
    rows = param.shape[0] if param.ndim else 1
    axes = _cut_axes(param)
    if not axes:
        return Shard(None, (mesh.get_rank(),), 0, rows)
    if len(axes) > 1 or not placements[axes[0]].is_shard(0):
        raise ValueError(
            f"{name} is distributed as {placements}, and Automagic steps what is sharded by its first axis alone; use "
            "fully_shard without tensor parallelism and without a shard_placement_fn"
        )
    height = -(-rows // mesh.size(axes[0]))  # as torch.chunk cuts: the last ranks may get fewer rows, or none
    first = min(rows, height * mesh.get_local_rank(axes[0]))
    ranks = torch.distributed.get_process_group_ranks(mesh.get_group(axes[0]))
    return Shard(axes[0], tuple(ranks), first, min(rows, first + height) - first)


def _cut_axes(tensor: Tensor) -> list[int]:
    """Lists the axes of a tensor's mesh on which its ranks hold different things, none of a plain tensor's."""
    mesh, placements = getattr(tensor, "device_mesh", None), getattr(tensor, "placements", ())
    return [i for i, p in enumerate(placements) if mesh is not None and mesh.size(i) > 1 and not p.is_replicate()]


def local(tensor: Tensor) -> Tensor:
    """Returns what lies on this rank: a DTensor's own rows, which share its memory; other tensors as they are."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def whole(tensor: Tensor) -> Tensor:
    """Returns all of a tensor; of a DTensor every rank must ask for it."""
    full_tensor = getattr(tensor, "full_tensor", None)
    return tensor if full_tensor is None else full_tensor()


class RankSums:
    """Adds up over the ranks that share parameters, many tensors in one all-reduce, the same bits on every rank."""

    def __init__(self, group: Any, size: int) -> None:
        """Takes a process group, None where nobody else has anything to add, and its size."""
        self.group, self.size = group, size

    @classmethod
    def among(cls, params: Iterable[Tensor], shards: Iterable[Shard | None]) -> "RankSums | None":
        """Finds the ranks that share the parameters, None where there are only plain tensors.

        Raises:
            ValueError: parameters are sharded over different ranks, so that they could not agree on one rate.
        """
        shards, groups = list(shards), dict[tuple[int, ...], Any]()
        for param, shard in zip(params, shards, strict=True):
            if shard is not None and shard.axis is not None:
                groups.setdefault(shard.ranks, param.device_mesh.get_group(shard.axis))  # type: ignore[attr-defined]
        if len(groups) > 1:
            raise ValueError(
                f"parameters are sharded over different ranks, {' and '.join(map(str, groups))}; one optimizer needs "
                "one mesh: build one for each"
            )
        alone = cls(None, 1) if any(shard is not None for shard in shards) else None
        return next((cls(group, len(ranks)) for ranks, group in groups.items()), alone)

    def add(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Returns the sum of each tensor over the ranks; every rank must bring the same shapes."""
        if not tensors or self.group is None:
            return list(tensors)
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        torch.distributed.all_reduce(flat, group=self.group)
        parts = flat.split([tensor.numel() for tensor in tensors])
        return [part.view(t.shape).to(t.dtype) for part, t in zip(parts, tensors, strict=True)]

    def add_checks(self, grads: Sequence[Tensor], bad: Tensor, norms: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Tells every rank what the others found in their rows of the gradients.

        Args:
            grads: gradients as the parameters have them, DTensors or plain.
            bad: which of them have an element that is not finite here  # [k], bool
            norms: their L2 norms here, None where nobody asks  # [k]

        Returns:
            Which have one anywhere, and the norms of the whole gradients.
        """
        if norms is None:
            return self.add([bad.to(torch.float32)])[0] > 0, None
        are_cut = tuple(bool(_cut_axes(grad)) for grad in grads)
        share = norms * _shares(are_cut, self.size, norms.device)
        marks, squares = self.add([bad.to(torch.float32), share.square()])
        return marks > 0, squares.sqrt()


@functools.lru_cache(maxsize=16)
def _shares(are_cut: tuple[bool, ...], size: int, device: torch.device) -> Tensor:
    """Says how much of each norm counts on a rank, so that what all ranks hold counts once; kept on the device."""
    return torch.tensor([1.0 if is_cut else size**-0.5 for is_cut in are_cut], device=device)


def refuse_flat_shards(groups: Sequence[Mapping[str, Any]]) -> None:
    """Raises where parameters have been made into flat pieces without rows, by FSDP1 or by DeepSpeed ZeRO.

    Of DeepSpeed's pieces of bare parameters, about which nothing was known, it is said how they are stepped.

    Raises:
        ValueError: with who did it and the remedy.
    """
    for group in groups:
        lengths = {name: len(group[name]) for name in PER_PARAMETER_TELLS if group.get(name)}
        for name, length in lengths.items():
            if length != len(group["params"]) and all(p.ndim == 1 for p in group["params"]):
                raise ValueError(
                    f"a param group lists {length} {name} and holds {len(group['params'])} tensors: DeepSpeed ZeRO "
                    "replaces parameters by flat pieces, which have no rows to factor or to quantise; use FSDP2 or "
                    "DDP, or an optimizer without factors"
                )
    # torch marks FSDP1's pieces so; with NO_SHARD parameters bear the mark and keep their shapes
    params = [p for group in groups for p in group["params"]]
    marked = [i for i, p in enumerate(params) if is_stepped(p) and getattr(p, "_fsdp_flattened", False)]
    if marked and all(params[i].ndim == 1 for i in marked):
        raise ValueError(
            f"{parameter_names(groups)[marked[0]]} is a flat piece of FSDP1, which has no rows to factor or to "
            'quantise; use FSDP2: fully_shard(model), or fsdp_config={"version": 2} of TrainingArguments'
        )
    if ZERO in sys.modules and params and all(len(g["params"]) == 1 and g["params"][0].ndim == 1 for g in groups):
        logger.warning(
            "the parameters are flat pieces, as DeepSpeed ZeRO makes them: they step as vectors, without factors, "
            "8 bits and roles, in 8 bytes an element; FSDP2 and DDP keep all that"
        )
