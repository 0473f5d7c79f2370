"""Finds what a model trains: every trainable parameter with its role, rank, scaling and LoRA partner."""

import dataclasses
import itertools
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from .optim.attach import READERS
from .optim.freshness import look_trained
from .optim.names import display_name
from .optim.roles import Role
from .options import unknown_name_error
from .peft_layers import LORA_FACTORS, MAGNITUDE, NamedRole, claim_parameters

__all__ = ["NamedRole", "find_parameters", "group_by_name", "param_groups"]

ROLE_OF_PART = {**LORA_FACTORS, MAGNITUDE: Role.MAGNITUDE, "lora_E": Role.ADAPTER, "modules_to_save": Role.NEW}


def param_groups(
    model: nn.Module, *, weight_decay: float = 0.0, new_modules: Iterable[str] = ()
) -> list[dict[str, Any]]:
    """Sorts a model's trainable parameters into groups of one role and adapter, with names, ranks, scalings and pairs.

    Where all full weights that train are as they were initialised, their groups say `is_fresh`. The order and
    number of groups do not depend on that, so that a checkpoint finds the same ones again.

    Args:
        model: a plain or PEFT model.
        weight_decay: for all groups but magnitudes, biases, norms and factors that start at one.
        new_modules: names of freshly initialised modules, such as `"classifier"`; they step at the adapters' rate.

    Raises:
        TypeError: a name of `new_modules` is not part of the model.
        ValueError: nothing in the model is trainable.
    """
    found = find_parameters(model, new_modules=new_modules)
    if not found:
        raise ValueError(f"{type(model).__name__} has no trainable parameter; add an adapter, or set requires_grad")
    full = [member for member in found if member.is_full_weight]
    weights, norms = ([m.param for m in full if m.role is role] for role in (Role.FULL, Role.NORM))
    is_fresh = look_trained(weights, norms) is False
    return [group | {"is_fresh": is_fresh and group["is_full_weight"]} for group in _groups(found, weight_decay)]


def find_parameters(model: nn.Module, *, new_modules: Iterable[str] = ()) -> list[NamedRole]:
    """Returns every trainable parameter of a model exactly once, in the order of `model.named_parameters()`.

    Tuner layers speak first, then modules_to_save, then whatever else PEFT hung beside the model, then hand-written
    `lora_A`/`lora_B` siblings, then the kind of the module. Trainable tokens count as `adapter`: a few rows, mostly of
    new tokens.

    Raises:
        TypeError: a name of `new_modules` is not part of the model.
    """
    claims: dict[int, NamedRole] = {}
    products: dict[int, set[str]] = defaultdict(set)  # of each factor; tied layers share one among several
    for claim, product in claim_parameters(list(model.named_modules())):
        claims.setdefault(id(claim.param), claim)
        products[id(claim.param)].update({product} - {""})

    named = [(display_name(name), param) for name, param in model.named_parameters()]
    new_modules = _checked(new_modules, [name for name, _ in named])
    trainable = [(name, param) for name, param in named if param.requires_grad]
    pairs = _number_pairs([products[id(param)] for _, param in trainable])
    return [
        _settle(claims[id(param)], name, pair, is_new=any(_is_below(name, module) for module in new_modules))
        for (name, param), pair in zip(trainable, pairs, strict=True)
    ]


def group_by_name(named: Iterable[tuple[str, nn.Parameter]], *, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """Sorts (name, parameter) pairs into groups by what PEFT's names tell, where the model itself is not at hand.

    Names tell LoRA's factors, magnitudes, saved heads and biases, but neither scalings, taken as 1, nor the kind of a
    plain weight: such weights step at the adapters' rate, and at a pretrained weight's where their values show that
    they were trained, as parameters without a name do. `param_groups(model)` knows all.
    """
    named = [(display_name(name), param) for name, param in named if param.requires_grad]
    read = [_read_name(name, param) for name, param in named]
    adalora = {found.module for found, _ in read if ".lora_E" in found.name}  # B diag(E) A is not the plain product
    pairs = _number_pairs([{product} - {""} if found.module not in adalora else set() for found, product in read])
    plain = [not ROLE_OF_PART.keys() & set(found.name.split(".")) for found, _ in read]
    is_full = bool(look_trained(found.param for (found, _), is_plain in zip(read, plain, strict=True) if is_plain))
    settled = [
        dataclasses.replace(found, pair=pair, is_full_weight=is_full and is_plain)
        for (found, _), pair, is_plain in zip(read, pairs, plain, strict=True)
    ]
    return _groups(settled, weight_decay)


READERS |= {"model": param_groups, "names": group_by_name}


def _groups(found: Iterable[NamedRole], weight_decay: float) -> list[dict[str, Any]]:
    """Sorts parameters into groups that are equal in role, adapter, rate, decay and device mesh."""
    groups: dict[tuple[Any, ...], list[NamedRole]] = defaultdict(list)
    meshes: list[Any] = []  # DTensors of different meshes cannot share one kernel call
    for member in found:
        mesh = getattr(member.param, "device_mesh", None)
        if mesh not in meshes:
            meshes.append(mesh)
        place = list(Role).index(member.role)
        groups[place, member.adapter, member.is_full_weight, not member.decays, meshes.index(mesh)].append(member)
    width = _width([member for group in groups.values() for member in group])
    return [_group(groups[key], weight_decay) | {"width": width} for key in sorted(groups)]


def _width(members: Sequence[NamedRole]) -> float | None:
    """Returns the median number of inputs of the layers that train, None where no parameter tells it."""
    roles = (Role.LORA_A, Role.FULL, Role.ADAPTER)
    known = [m for m in members if m.role in roles and (m.role is not Role.ADAPTER or m.is_full_weight)]
    telling = [m.param.shape[1:].numel() for m in known if m.param.ndim > 1]
    return float(statistics.median(telling)) if telling else None


def _group(members: Sequence[NamedRole], weight_decay: float) -> dict[str, Any]:
    first = members[0]
    return {
        "params": [m.param for m in members],
        "role": first.role.value,
        "adapter": first.adapter,
        "is_full_weight": first.is_full_weight,
        "weight_decay": weight_decay if first.decays else 0.0,
        "names": [m.name for m in members],
        "ranks": [m.rank for m in members],
        "scalings": [m.scaling for m in members],
        "pairs": [m.pair for m in members],
    }


def _settle(claim: NamedRole, name: str, pair: int, is_new: bool) -> NamedRole:
    """Completes a claim with what only the whole model tells."""
    role, is_full_weight = claim.role, claim.is_full_weight
    if is_new and is_full_weight:
        role, is_full_weight = (role if role in (Role.BIAS, Role.NORM) else Role.NEW), False
    return dataclasses.replace(
        claim,
        name=name,
        role=role,
        module=display_name(claim.module),
        pair=pair,
        is_full_weight=is_full_weight,
        decays=claim.decays and role.decays,
    )


def _number_pairs(products: Sequence[set[str]]) -> list[int]:
    """Numbers the products BA whose two factors both train and belong to no other product; -1 elsewhere.

    Args:
        products: for each trainable parameter the products that it is a factor of.
    """
    alone = [next(iter(names)) if len(names) == 1 else "" for names in products]
    count = Counter(alone)
    numbers = {name: number for number, name in enumerate(n for n in count if n and count[n] == 2)}
    return [numbers.get(name, -1) for name in alone]


def _checked(new_modules: Iterable[str], names: Sequence[str]) -> tuple[str, ...]:
    new_modules = (new_modules,) if isinstance(new_modules, str) else tuple(new_modules)
    for module in new_modules:
        if not any(_is_below(name, module) for name in names):
            raise unknown_name_error("module", module, {part for name in names for part in name.split(".")})
    return new_modules


def _is_below(name: str, module: str) -> bool:
    return f".{module}." in f".{name}."


def _read_name(name: str, param: nn.Parameter) -> tuple[NamedRole, str]:
    """Reads `<layer>.lora_A.<adapter>.weight` and its kin: the role, and the product that it is a factor of."""
    parts = name.split(".")
    layer = list(itertools.takewhile(lambda part: part not in ROLE_OF_PART, parts))
    if len(layer) == len(parts):
        role = Role.BIAS if parts[-1].endswith("bias") and param.ndim <= 1 else Role.ADAPTER
        return NamedRole(name, param, role, decays=role.decays), ""
    part, *rest = parts[len(layer) :]
    adapter = rest[0] if rest and rest[0] not in ("weight", "bias") else ""
    path = ".".join(layer)
    if parts[-1] == "bias":
        return NamedRole(name, param, Role.BIAS, adapter, path, decays=False), ""
    role = ROLE_OF_PART[part]
    if part not in LORA_FACTORS:
        return NamedRole(name, param, role, adapter, path, decays=role.decays), ""
    rank = param.shape[1 if role.is_lora_B else 0]
    return NamedRole(name, param, role, adapter, path, rank, scaling=1.0), f"{path} {adapter} {part[:-1]}"
