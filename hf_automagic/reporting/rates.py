"""The learning rates that an optimizer, whosever it is, really steps with, read from the device at once."""

import dataclasses
import math
from collections.abc import Hashable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

Scalar = float | Tensor
Key = TypeVar("Key", bound=Hashable)


@dataclasses.dataclass(frozen=True)
class RateSummary:
    """The smallest, mean and largest learning rate, the mean weighted by the number of elements."""

    minimum: float
    mean: float
    maximum: float


def unwrap_optimizer(optimizer: Any) -> Any:
    """Returns the innermost optimizer inside the wrappers of accelerate, DeepSpeed and others.

    Args:
        optimizer: an optimizer, or a wrapper that keeps what it wraps as `optimizer`.
    """
    seen = {id(optimizer)}
    while hasattr(inner := getattr(optimizer, "optimizer", None), "param_groups") and id(inner) not in seen:
        seen.add(id(inner))
        optimizer = inner
    return optimizer


def read_at_once(values: Mapping[Key, Scalar]) -> dict[Key, Tensor]:
    """Brings numbers from wherever they lie to the host, in one transfer.

    Args:
        values: Python numbers, and tensors of any shape on any devices.

    Returns:
        Tensors of the same shapes on the CPU.
    """
    read = {key: torch.tensor(float(v), dtype=torch.float64) for key, v in values.items() if not isinstance(v, Tensor)}
    tensors = {key: local(v).detach() for key, v in values.items() if isinstance(v, Tensor)}
    if tensors:
        device = next((t.device for t in tensors.values() if t.device.type != "cpu"), torch.device("cpu"))
        dtype = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
        flat = torch.cat([t.to(device, dtype, non_blocking=True).flatten() for t in tensors.values()]).cpu()
        parts = flat.split([t.numel() for t in tensors.values()])
        read |= {key: part.view(t.shape) for (key, t), part in zip(tensors.items(), parts, strict=True)}
    return read


def local(tensor: Tensor) -> Tensor:
    """Returns this process's shard of a distributed tensor, other tensors as they are."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def summarize_rates(optimizer: Any) -> RateSummary:
    """Returns the learning rates that an optimizer steps with, read from the device at once.

    Understands Prodigy and D-Adaptation (d times lr), Adafactor of transformers and of torch, schedule-free
    optimizers, bitsandbytes with its overrides, and whoever keeps the rate in `group["lr"]` or
    `group["effective_lr"]`.

    Args:
        optimizer: any optimizer, wrapped or not.
    """
    optimizer = unwrap_optimizer(optimizer)
    found = list(_rates(optimizer))
    rates = read_at_once({i: rate for i, (rate, _) in enumerate(found)})
    return weigh_rates([(float(rates[i]), elements) for i, (_, elements) in enumerate(found)])


def weigh_rates(rates: Iterable[tuple[float, int]]) -> RateSummary:
    """Summarises (rate, elements) pairs; without any, all three are 0."""
    rates = list(rates)
    total = sum(elements for _, elements in rates)
    if not total:
        return RateSummary(0.0, 0.0, 0.0)
    present = [rate for rate, elements in rates if elements]
    return RateSummary(min(present), math.fsum(r * n for r, n in rates) / total, max(present))


def _rates(optimizer: Any) -> Iterable[tuple[Scalar, int]]:
    """Yields the rate of each group, or of each parameter where they differ, with the number of its elements."""
    for index, group in enumerate(optimizer.param_groups):
        params = group["params"]
        if "effective_lr" in group:
            yield group["effective_lr"], _elements(params)
        elif "relative_step" in group:
            yield from ((_adafactor(group, optimizer.state.get(p, {})), p.numel()) for p in params)
        elif isinstance(optimizer, torch.optim.Adafactor):
            yield from ((_torch_adafactor(group, p, optimizer.state.get(p, {})), p.numel()) for p in params)
        elif "d" in group:
            yield group["d"] * group["lr"] * _prodigy_correction(group), _elements(params)
        elif hasattr(optimizer, "get_config") and hasattr(optimizer, "mng"):  # bitsandbytes: overrides by parameter
            yield from ((optimizer.get_config(index, i, group)["lr"], p.numel()) for i, p in enumerate(params))
        else:
            yield group.get("scheduled_lr", group["lr"]), _elements(params)


def _elements(params: Iterable[Tensor]) -> int:
    return sum(p.numel() for p in params)


def _adafactor(group: Mapping[str, Any], state: Mapping[str, Any]) -> Scalar:
    """Returns the rate of one parameter of transformers' Adafactor (arXiv 1804.04235, section 8)."""
    step = max(1, state.get("step", 1))
    rate = group["lr"] or 0.0
    if group["relative_step"]:
        rate = min(1e-6 * step if group["warmup_init"] else 1e-2, 1 / math.sqrt(step))
    if not group["scale_parameter"]:
        return rate
    return rate * torch.as_tensor(state.get("RMS", 0.0)).clamp_min(group["eps"][1])


def _torch_adafactor(group: Mapping[str, Any], param: Tensor, state: Mapping[str, Any]) -> Scalar:
    """Returns the rate of one parameter of torch.optim.Adafactor: max(eps2, RMS(weights)) min(lr, 1 / sqrt(step))."""
    rms = local(param.detach()).float().square().mean().sqrt()
    step = torch.as_tensor(state.get("step", 1.0)).to(rms.device).clamp_min(1.0)
    return rms.clamp_min(group["eps"][1]) * torch.as_tensor(group["lr"]).to(rms.device).minimum(step.rsqrt())


def _prodigy_correction(group: Mapping[str, Any]) -> float:
    """Returns Prodigy's bias correction of the last step, 1 where it is off."""
    if not group.get("use_bias_correction"):
        return 1.0
    beta1, beta2 = group["betas"][:2]
    step = max(1, group["k"])
    return math.sqrt(1 - beta2**step) / (1 - beta1**step)
