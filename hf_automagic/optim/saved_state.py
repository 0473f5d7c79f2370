"""What a state_dict must be before any of it is loaded, so that a refused one leaves the optimizer as it was."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .distributed import local
from .groups import parameter_names
from .names import check_names

COUNTERS = ("applied", "skipped", "consecutive", "offender")


def check_saved(saved: Any, own: Sequence[Mapping[str, Any]], schema: int) -> None:
    """Raises where a state_dict is not ours, not this model's, or damaged.

    Args:
        saved: as `Automagic.state_dict` returned it.
        own: the optimizer's groups.
        schema: the newest that this version reads.

    Raises:
        ValueError: with what is wrong and the remedy.
    """
    groups, states = saved["param_groups"], saved["state"]
    for group in groups:
        _check_schema(group.get("schema"), schema)
    check_names(groups, own)
    if groups:
        _check_counters(groups[0], states)
    positions = {id_: i for i, id_ in enumerate(itertools.chain.from_iterable(g["params"] for g in groups))}
    params, names = [p for group in own for p in group["params"]], parameter_names(own)
    for id_, state in states.items():
        position = positions.get(id_, len(params))
        if position < len(params):  # torch itself says where numbers of parameters differ
            _check_state(names[position], state, params[position])


def check_form(saved: Any) -> None:
    """Raises where something is no state_dict at all.

    Raises:
        ValueError: with what was given.
    """
    if not (isinstance(saved, Mapping) and {"state", "param_groups"} <= saved.keys()):
        told = f"a dictionary of {sorted(map(str, saved))[:5]}" if isinstance(saved, Mapping) else type(saved).__name__
        raise ValueError(
            f"a state_dict of an optimizer has 'state' and 'param_groups', this is {told}; hand over what "
            "optimizer.state_dict() returned"
        )


def _check_schema(saved: Any, schema: int) -> None:
    if not isinstance(saved, int) or saved < 1:
        raise ValueError(
            "this state_dict was not written by hf_automagic; start the optimizer fresh, or resume with "
            "the optimizer that wrote it"
        )
    if saved > schema:
        raise ValueError(
            f"this state_dict has schema {saved}, this version reads up to {schema}; upgrade hf_automagic"
        )


def _check_counters(group: Mapping[str, Any], states: Mapping[Any, Any]) -> None:
    """Raises where steps were counted and no states came of them, or the other way round."""
    counters = group.get("counters")
    is_whole = isinstance(counters, Mapping) and all(isinstance(counters.get(name), Tensor) for name in COUNTERS)
    if (counters is not None or states) and not is_whole:
        raise ValueError(
            f"the state_dict lacks the counters {', '.join(COUNTERS)} of its first group: it has been changed since "
            "it was saved; load one as optimizer.state_dict() returned it"
        )
    if is_whole and counters is not None and not states and counters["applied"] > 0:
        raise ValueError(
            f"the state_dict has counted {int(counters['applied'])} steps and holds no states: the optimizer would "
            "silently start afresh; load one that is whole, or build a new optimizer"
        )


def _check_state(owner: str, state: Mapping[str, Any], param: Tensor) -> None:
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"the saved {name} of {owner} is {value!r} and no tensor; load a state_dict as optimizer.state_dict() "
                "returned it"
            )
        _check_shape(owner, name, value, param)
    values = {name: local(value) for name, value in state.items() if not value.is_meta}
    odd = [name for name, value in values.items() if value.is_floating_point() and not bool(value.isfinite().all())]
    odd += [name for name in ("step",) if name in values and bool((values[name] < 0).any())]
    if odd:
        raise ValueError(
            f"the saved {odd[0]} of {owner} holds values that no step leaves behind, as NaN or a negative count: the "
            "file is damaged; resume from another checkpoint"
        )


def _check_shape(owner: str, name: str, saved: Tensor, param: Tensor) -> None:
    """Raises where a state as large as its parameter belongs to a parameter of another shape."""
    rows = param.shape[0] if param.ndim else 1
    is_vector = saved.ndim < 2 or (saved.dtype == torch.uint8 and saved.shape[1:] == (2,))  # 16-bit codes are bytes
    if not is_vector and (saved.shape[0] != rows or (saved.ndim == param.ndim > 2 and saved.shape != param.shape)):
        raise ValueError(
            f"the saved {name} of {owner} has shape {tuple(saved.shape)}, the parameter {tuple(param.shape)}: it "
            "belongs to another model; resume with the model that was trained, in the same order of parameters"
        )
