"""The guard: a step with a non-finite gradient changes nothing, and is counted on the device."""

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels.support import LARGEST_GRADIENT
from .distributed import RankSums, local


@dataclasses.dataclass(frozen=True)
class GradientCheck:
    """What the first look at all gradients found, on the device of the first of them.

    Args:
        finite: whether every element is, and is no larger than `LARGEST_GRADIENT`  # [], bool
        offender: position of the first parameter with a non-finite element, -1 without one  # [], int64
        clip: factor that brings the gradients to `max_grad_norm`, None without that option  # []
        norm: total norm of the gradients, None without that option  # []
    """

    finite: Tensor
    offender: Tensor
    clip: Tensor | None
    norm: Tensor | None = None


def check_rates(groups: Iterable[Mapping[str, Any]]) -> None:
    """Raises where a scheduler, or a file, has made a group's rate something that would spoil every weight.

    Raises:
        ValueError: a rate is not finite. One in a tensor is not looked at: that would read the device.
    """
    for group in groups:
        lr = group["lr"]
        if isinstance(lr, float) and not math.isfinite(lr):
            raise ValueError(f"a param group's lr has become {lr}; nothing was stepped: check the scheduler")


def check_gradients(
    grads: Sequence[Tensor], positions: Sequence[int], max_grad_norm: float | None, ranks: RankSums | None = None
) -> GradientCheck:
    """Looks at every gradient once, before anything is changed.

    Args:
        grads: gradients of one or several devices, not empty.
        positions: the parameters' stable numbers.
        max_grad_norm: largest total L2 norm, None for no clipping.
        ranks: adds up over the ranks that hold the gradients' rows, None for plain tensors.
    """
    here = grads if ranks is None else [local(grad) for grad in grads]
    bad = ~(_largest(here) <= LARGEST_GRADIENT)  # true of NaN, too
    norms = None if max_grad_norm is None else _norms(here, 2.0)
    if ranks is not None:
        bad, norms = ranks.add_checks(grads, bad, norms)
    clip = norm = None
    if max_grad_norm is not None and norms is not None:
        norm = torch.linalg.vector_norm(norms)
        clip = (max_grad_norm / (norm + 1e-6)).clamp_max(1.0)
    return GradientCheck(~bad.any(), _position_of_first(bad, positions), clip, norm)


def _largest(grads: Sequence[Tensor]) -> Tensor:
    """Returns the largest magnitude of each gradient, NaN where it holds one  # [k], float32"""
    if any(type(grad) is not Tensor or grad.device.type != "cpu" or not grad.numel() for grad in grads):
        return _norms(grads, float("inf"))
    lowest, highest = zip(*map(torch.aminmax, grads), strict=True)  # a tenth of the time of that norm on a CPU
    bounds = [torch.stack([bound.to(torch.float32) for bound in bounds]) for bounds in (lowest, highest)]
    return torch.maximum(-bounds[0], bounds[1])


def _norms(grads: Sequence[Tensor], order: float) -> Tensor:
    """Returns the norm of each gradient on the first one's device, 0 of one without elements  # [k], float32"""
    device = grads[0].device
    by_kind: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, grad in enumerate(grads):
        if grad.numel():
            by_kind.setdefault((grad.device, grad.dtype), []).append(i)
    norms = [grad if grad.numel() else torch.zeros((), device=device) for grad in grads]
    for (_, kind), indices in by_kind.items():
        dtype = torch.float32 if order == 2.0 and kind.itemsize < 4 else None
        some = torch._foreach_norm([grads[i] for i in indices], order, dtype=dtype)  # pyright: ignore
        for i, norm in zip(indices, some, strict=True):
            norms[i] = norm.to(device=device, dtype=torch.float32)
    return torch.stack(norms)


def _position_of_first(bad: Tensor, positions: Sequence[int]) -> Tensor:
    """Returns the position of the first bad gradient, -1 without one  # [], int64"""
    table = _table(tuple(positions), bad.device)
    return torch.where(bad.any(), table[bad.to(torch.int64).argmax().reshape(1)].squeeze(0), -1)


@functools.lru_cache(maxsize=16)
def _table(positions: tuple[int, ...], device: torch.device) -> Tensor:
    """Keeps the positions on the device: a copy from the host would make every step wait."""
    return torch.tensor(positions, device=device, dtype=torch.int64)


def new_counters(device: torch.device) -> dict[str, Tensor]:
    """Creates the device counters of an optimizer: applied and skipped steps, skipped ones in a row, last offender."""
    zero = torch.zeros((), dtype=torch.int64, device=device)
    return {"applied": zero, "skipped": zero.clone(), "consecutive": zero.clone(), "offender": zero - 1}


def count_step(counters: dict[str, Tensor], check: GradientCheck) -> None:
    """Counts a step that was applied or skipped, in place."""
    finite = check.finite
    counted = {
        "applied": counters["applied"] + finite,
        "skipped": counters["skipped"] + ~finite,
        "consecutive": torch.where(finite, 0, counters["consecutive"] + 1),
        "offender": torch.where(finite, counters["offender"], check.offender),
    }
    for name, value in counted.items():
        counters[name].copy_(value)
