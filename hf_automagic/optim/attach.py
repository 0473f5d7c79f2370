"""Attach: what a model, or its parameters' names, tell of roles and pairs reaches an optimizer."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from statistics import median
from typing import Any, Literal

from torch import Tensor, nn

from ..config import AutomagicConfig, option_names
from .freshness import look_trained
from .groups import fill_group, is_stepped, schedule_factor
from .pairs import ALIGNED

Groups = list[dict[str, Any]]
Reader = Callable[..., Groups]

# Who sorts parameters into groups by role, and what it reads. peft.py puts itself here: it knows the layers of models,
# and stands above this file.
READERS: dict[Literal["model", "names"], Reader] = {}

SHARED = ("counters", "events", "context_state", "host_steps")  # the whole optimizer's, kept in its first group
PER_PARAMETER = (*ALIGNED, "param_names", "block_sizes")  # lists of a group with one entry for each parameter


def read_names(params: Any, weight_decay: float) -> Any:
    """Sorts (name, parameter) pairs into groups by role, with pairs; of others it reads whether they are trained.

    Raises:
        TypeError: the parameters come as a set, whose order changes between runs.
    """
    if isinstance(params, Tensor):
        return params
    if isinstance(params, set | frozenset):
        raise TypeError(
            "parameters came as a set, whose order changes between runs, so that no checkpoint would fit; pass a list"
        )
    params = list(params)
    if params and all(isinstance(entry, tuple) for entry in params):
        return READERS["names"](params, weight_decay=weight_decay)
    return _told_by_values(params if any(isinstance(entry, dict) for entry in params) else [{"params": params}])


def _told_by_values(groups: Groups) -> Groups:
    """Marks groups without a role as pretrained weights where their values show training.

    Where they do not, they may be a new model's, but also the fresh factors of an adapter: their rate lies between.
    """
    read = [isinstance(group.get("params"), (list, tuple, Iterator)) for group in groups]
    groups = [{**g, "params": list(g["params"])} if can else g for g, can in zip(groups, read, strict=True)]
    bare = [can and not {"role", "is_full_weight"} & g.keys() for g, can in zip(groups, read, strict=True)]
    every = [p for g, is_bare in zip(groups, bare, strict=True) if is_bare for p in g["params"]]
    weights = [p for p in every if isinstance(p, Tensor) and p.requires_grad and p.ndim > 1]
    if not look_trained(weights):
        return groups
    told = {"is_full_weight": True, "width": float(median(p.shape[1:].numel() for p in weights))}
    return [{**told, **g} if is_bare else g for g, is_bare in zip(groups, bare, strict=True)]


def attached_groups(
    groups: Sequence[dict[str, Any]], model: nn.Module, config: AutomagicConfig, new_modules: Iterable[str] = ()
) -> Groups:
    """Splits an optimizer's groups by role, with the names, scalings and pairs that the model tells.

    Options that a group has for itself, its tuned rate and its schedule go on in each of its parts. Frozen parameters
    are left out: one group of bare parameters becomes those of `param_groups(model)`. Another model's stay, at the
    end.

    Args:
        groups: filled param groups.
        model: whose parameters they are.
        config: the optimizer's options.
        new_modules: names of freshly initialised modules.

    Raises:
        ValueError: the model trains none of the parameters.
    """
    new_modules = (new_modules,) if isinstance(new_modules, str) else tuple(new_modules)
    parts: list[tuple[int, dict[str, Any]]] = []
    rest: Groups = []
    for group in groups:
        entries = READERS["model"](model, weight_decay=group["weight_decay"], new_modules=new_modules)
        known = list(_told_parts(group, entries, config))
        parts += known
        rest += _rest(group, [part for _, part in known])
    if not parts:
        raise ValueError(
            f"{type(model).__name__} trains none of this optimizer's parameters; attach the model that they belong to"
        )
    ordered = [part for _, part in sorted(parts, key=lambda numbered: numbered[0])]
    ordered[0] |= {key: groups[0][key] for key in SHARED if key in groups[0]}
    return ordered + rest


def _told_parts(
    group: Mapping[str, Any], entries: Groups, config: AutomagicConfig
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the part of a group that each of the model's groups tells of, with that group's number."""
    place = {id(param): i for i, param in enumerate(group["params"])}
    own = _own_options(group, config)
    schedule = schedule_factor(group)
    fixed = {*option_names(), *SHARED, *PER_PARAMETER, "params", "initial_lr"}
    brought = {key: value for key, value in group.items() if key not in fixed}
    for number, entry in enumerate(entries):
        chosen = [i for i, param in enumerate(entry["params"]) if id(param) in place]
        if chosen:
            here = [place[id(entry["params"][i])] for i in chosen]
            was_fresh = bool(group.get("is_fresh"))  # which training since then does not take back
            told = {**entry, **_pick(entry, chosen), "is_fresh": entry["is_fresh"] or was_fresh}
            part = fill_group({**brought, **own, **_pick(group, here), **told}, config)
            yield number, part | {"lr": part["initial_lr"] * schedule}


def _rest(group: dict[str, Any], known: Groups) -> Groups:
    """Returns what is left of a group, nothing where the model knows all that is trained."""
    told = {id(param) for part in known for param in part["params"]}
    left = [i for i, param in enumerate(group["params"]) if id(param) not in told and is_stepped(param)]
    if group["params"] and not left:
        return []
    return [{key: value for key, value in group.items() if key not in SHARED} | _pick(group, left)]


def _pick(group: Mapping[str, Any], chosen: Sequence[int]) -> dict[str, Any]:
    """Returns a group's parameters and all that it tells of them one by one, for some of them."""
    return {key: [group[key][i] for i in chosen] for key in ("params", *PER_PARAMETER) if group.get(key)}


def _own_options(group: Mapping[str, Any], config: AutomagicConfig) -> dict[str, Any]:
    """Returns the options that a group was given for itself: those that its role alone does not explain."""
    plain = fill_group({key: group.get(key) for key in ("role", "is_full_weight", "is_fresh", "width")}, config)
    own = {name: group[name] for name in option_names() if name != "lr" and group[name] != plain[name]}
    if group["initial_lr"] == plain["initial_lr"]:
        return own
    ratio = plain["initial_lr"] / config.lr if config.lr else 1.0  # fill_group multiplies B's with it
    return own | {"lr": group["initial_lr"] / ratio}
