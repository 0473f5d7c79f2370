"""Param groups: options checked and filled in, rails by role, and the rate that a group really steps with."""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..config import AutomagicConfig, make_config, option_names
from .names import own_names
from .roles import Role

logger = logging.getLogger(__name__)

OF_ALL = ("max_grad_norm", "lr_pool")  # options of the step as a whole, which no group has for itself
SUPPORTED_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def fill_group(group: dict[str, Any], config: AutomagicConfig) -> dict[str, Any]:
    """Completes a param group: every option that it does not set itself, its role, rails and starting rate.

    The group's own rails win; otherwise the upper one follows the role and the width (`Role.rail_scale`), and B of a
    LoRA has it and its rate scaled by `loraplus_lr_ratio`. What starts from nothing falls earlier.

    Args:
        group: as given to the optimizer; keys beside the options are `role`, `is_full_weight`, `is_fresh`, `width`
            and what peft.py adds.
        config: the optimizer's options.

    Raises:
        ValueError: an option is outside its bounds, or the role does not exist.
    """
    own = {name: group[name] for name in option_names() if name in group}
    lr = own.pop("lr", config.lr)
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"Tensor lr must be 1-element, got one of shape {tuple(lr.shape)}")
    options = vars(config.replace(**own, lr=float(lr) if not isinstance(lr, Tensor) else config.lr))
    role = _role(group.get("role", Role.ADAPTER))
    is_full_weight = bool(group.get("is_full_weight", role.is_full_weight))
    is_fresh = is_full_weight and bool(group.get("is_fresh"))
    ratio = options["loraplus_lr_ratio"] if role.is_lora_B else 1.0
    upper = 1.0 if "max_lr" in own else role.rail_scale(is_full_weight, group.get("width"), is_fresh)
    max_lr = options["max_lr"] * upper * (1.0 if "max_lr" in own else ratio)
    filled = {
        **group,
        **options,
        "role": role.value,
        "is_full_weight": is_full_weight,
        "is_fresh": is_fresh,
        "lr": lr * ratio,
        "min_lr": min(options["min_lr"], max_lr),
        "max_lr": max_lr,
    }
    if "rail_steps" not in own:
        filled["rail_steps"] = math.ceil(options["rail_steps"] * role.fall_scale(is_full_weight, is_fresh))
    if not (role.decays or "weight_decay" in own):
        filled["weight_decay"] = 0.0
    start = filled["lr"]  # schedulers change one in a tensor in place
    filled.setdefault("initial_lr", start.detach().clone() if isinstance(start, Tensor) else start)
    return filled


def check_common(groups: Iterable[Mapping[str, Any]]) -> None:
    """Raises where groups differ in an option of the step as a whole; the first group's is the one that counts.

    Raises:
        ValueError: with the option and its values.
    """
    for name in OF_ALL:
        values = list(dict.fromkeys(group[name] for group in groups))
        if len(values) > 1:
            raise ValueError(
                f"{name} holds for all groups and cannot be {values[0]!r} in one and {values[1]!r} in another; "
                "give it to the optimizer"
            )


def _role(name: str) -> Role:
    try:
        return Role(name)
    except ValueError as error:
        raise ValueError(f"role must be one of {', '.join(r.value for r in Role)}, got {name!r}") from error


def group_config(group: Mapping[str, Any]) -> AutomagicConfig:
    """Reads a filled group's options back as a config."""
    options = {name: group[name] for name in option_names()}
    return make_config({**options, "lr": float(group["initial_lr"])})


def check_param(param: Tensor, name: str) -> None:
    """Raises where a parameter that is to be stepped is of a kind that cannot be.

    Raises:
        TypeError: the dtype is not a real floating type that torch computes with.
        ValueError: several of its elements are one place in memory.
    """
    if not is_stepped(param):
        return  # as the integers of a quantised base model
    if param.dtype not in SUPPORTED_DTYPES:
        kinds = ", ".join(str(d).removeprefix("torch.") for d in SUPPORTED_DTYPES)
        kind = str(param.dtype).removeprefix("torch.")
        raise TypeError(
            f"{name} is {kind}, and Automagic steps {kinds}; cast it, or freeze it with requires_grad_(False)"
        )
    if any(size > 1 and stride == 0 for size, stride in zip(param.shape, param.stride(), strict=True)):
        raise ValueError(
            f"{name} is expanded, shape {tuple(param.shape)} with strides {param.stride()}: several of its elements "
            "are one place in memory; make the parameter from expanded.clone()"
        )


def check_members(group: Mapping[str, Any]) -> None:
    """Raises where a group holds a parameter twice or one that cannot be stepped; see `check_param`.

    Raises:
        ValueError: a parameter stands in the group twice.
    """
    seen: dict[int, str] = {}
    for param, name in zip(group["params"], parameter_names([group]), strict=True):
        if id(param) in seen:
            raise ValueError(f"{name} and {seen[id(param)]} are one parameter; list every parameter once")
        seen[id(param)] = name
        check_param(param, name)


def refuse_sparse(groups: Sequence[Mapping[str, Any]]) -> None:
    """Raises where a parameter's gradient is sparse.

    Raises:
        TypeError: with the parameter's name and the remedy.
    """
    params = [p for group in groups for p in group["params"]]
    for param, name in zip(params, parameter_names(groups), strict=True):
        if param.grad is not None and param.grad.layout is not torch.strided:
            raise TypeError(
                f"{name} has a sparse gradient, and Automagic steps dense ones; build the embedding with "
                "sparse=False, or set grad to grad.to_dense()"
            )


def is_stepped(param: Tensor) -> bool:
    """Whether a parameter needs states: frozen ones, all of a base model's in a plain list of parameters, do not."""
    return param.requires_grad or param.grad is not None


def parameter_names(groups: Iterable[Mapping[str, Any]]) -> list[str]:
    """Returns the names of all parameters in order, made up from their role where a group brings none."""
    names: list[str] = []
    for group in groups:
        own = own_names(group)
        names += own or [f"parameter {len(names) + i} ({group['role']})" for i in range(len(group["params"]))]
    return names


def warn_of_high_start(groups: Iterable[Mapping[str, Any]]) -> None:
    """Says once that a starting rate lies above its rail."""
    for group in groups:
        if searches(group) and not isinstance(group["lr"], Tensor) and group["initial_lr"] > group["max_lr"]:
            logger.warning(
                "lr %.3g lies above max_lr %.3g of role %s: the run starts at the rail. Raise max_lr to step faster.",
                group["initial_lr"],
                group["max_lr"],
                group["role"],
            )
            return


def searches(group: Mapping[str, Any]) -> bool:
    """Whether a group's rate is searched for between its rails."""
    return group["self_tuning"] and group["lr_search"]


def schedule_factor(group: Mapping[str, Any]) -> float | Tensor:
    """Returns the scheduler's share of the rate, group["lr"] / initial_lr, at most 1; 0 where the rate starts from 0.

    A one-cycle schedule starts at a 25th of its peak: the rail is the peak of every schedule.
    """
    start = group["initial_lr"]
    share = group["lr"] / start if start else 0.0
    return share.clamp_max(1.0) if isinstance(share, Tensor) else min(share, 1.0)


def effective_lr(group: Mapping[str, Any], multiplier: Tensor, applied_steps: Tensor) -> Tensor:
    """Returns the rate that the next step applies, base_lr * M  # [], float32."""
    return base_lr(group, multiplier, applied_steps) * multiplier


def base_lr(group: Mapping[str, Any], multiplier: Tensor, applied_steps: Tensor) -> Tensor:
    """Returns the rate that the context's multiplier M is yet to multiply  # [], float32.

    schedule * clamp(r, min_lr, max_lr / max(M, 1)) * min(1, sqrt(rail_steps / step)), where r is max_lr, and in
    lr_search initial_lr * exp(log_rate); where self-tuning is off, group["lr"]. The fall is that of AdaGrad's rate on
    gradients of one size (Duchi et al. 2011), whose regret is least without knowing how long the run will be.

    Args:
        group: a filled group.
        multiplier: M of the context controller  # []
        applied_steps: steps done so far  # []
    """
    if group["self_tuning"]:
        rail = group["max_lr"] / multiplier.clamp_min(1.0)
        tuned = (group["initial_lr"] * group["log_rate"].exp()).clamp_min(group["min_lr"]).minimum(rail)
        rate = schedule_factor(group) * (tuned if group["lr_search"] else rail)
        if group["rail_steps"]:
            rate = rate * (group["rail_steps"] / (applied_steps + 1)).sqrt().clamp_max(1.0)
    else:
        rate = torch.ones_like(multiplier) * group["lr"]
    if group["warmup_steps"]:
        rate = rate * ((applied_steps + 1) / group["warmup_steps"]).clamp_max(1.0)
    return rate


def log_rate_limits(groups: Iterable[Mapping[str, Any]]) -> tuple[float, float]:
    """Returns where a log rate shared by the groups meets the first and the last of their rails  # (lower, upper)"""
    lower, upper = math.inf, -math.inf
    for group in groups:
        start = float(group["initial_lr"])
        if start > 0:
            lower = min(lower, math.log(max(group["min_lr"], 1e-38) / start))
            upper = max(upper, math.log(max(group["max_lr"], 1e-38) / start))
    return (lower, upper) if lower <= upper else (0.0, 0.0)
