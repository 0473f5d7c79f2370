"""state_dict in and out: plain tensors with their own storage, restored in the dtype they were saved in.

What one version saved loads in every later one; `automagic.SCHEMA` says when that takes a conversion.
"""

import logging
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..config import option_names, storage_option_names
from .saved_state import check_form, check_saved

logger = logging.getLogger(__name__)

OF_A_GROUP = ("role", "is_full_weight", "initial_lr")  # beside its options


class _Kept:
    """Carries a tensor through torch's loader, which would cast it to the parameter's dtype."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def pack_state(packed: dict[str, Any]) -> dict[str, Any]:
    """Returns a state_dict whose tensors own their storage, and not a view into a stack."""
    return {**packed, **{key: _map_tensors(packed[key], Tensor.clone) for key in ("state", "param_groups")}}


def _map_tensors(value: Any, change: Callable[[Tensor], Any]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _map_tensors(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_map_tensors(item, change) for item in value]
    return value


def load_packed_state(
    optimizer: Any, torch_load: Callable[[dict[str, Any]], None], state_dict: dict[str, Any]
) -> None:
    """Loads a state_dict through torch's own loader, keeping every dtype, onto each parameter's device.

    Two hooks stand next to the loader, inside those of the user, who sees tensors before and after.

    Args:
        optimizer: an Automagic.
        torch_load: torch.optim.Optimizer.load_state_dict, bound.
        state_dict: as `pack_state` returned it.

    Raises:
        ValueError: it is not ours, not this model's, or damaged; nothing has been loaded then.
    """
    check_form(state_dict)
    schema = optimizer.param_groups[0]["schema"] if optimizer.param_groups else 0
    own = [dict(group) for group in optimizer.param_groups]
    before = optimizer.register_load_state_dict_pre_hook(lambda _, loaded: _wrap(loaded, schema, own))
    after = optimizer.register_load_state_dict_post_hook(lambda _: _unwrap(optimizer, own), prepend=True)
    try:
        torch_load(state_dict)
    finally:
        before.remove()
        after.remove()


def _wrap(state_dict: dict[str, Any], schema: int, own: list[dict[str, Any]]) -> dict[str, Any]:
    """Checks a state_dict, and wraps its tensors for torch's loader."""
    check_saved(state_dict, own, schema)
    return {**state_dict, "state": _map_tensors(state_dict["state"], _Kept)}


def _unwrap(optimizer: Any, own: list[dict[str, Any]]) -> None:
    """Puts the tensors as they were into what torch loaded, and what the file does not decide."""
    for group, before in zip(optimizer.param_groups, own, strict=True):
        _tell_changed_options(group, before)
        # an option that the file's version did not have keeps the value that it has here
        kept = [name for name in (*option_names(), *OF_A_GROUP) if name in storage_option_names() or name not in group]
        group |= {name: before[name] for name in (*kept, "names", "param_names") if name in before}
    for param, state in optimizer.state.items():
        for name, kept in state.items():
            if isinstance(kept, _Kept):
                state[name] = kept.tensor.detach().to(param.device, copy=True)


def _tell_changed_options(group: dict[str, Any], before: dict[str, Any]) -> None:
    """Says which options of the file win over others that this optimizer was built with."""
    decided = [name for name in option_names() if name not in (*storage_option_names(), "lr") and name in group]
    changed = [f"{name} {group[name]} and not {before[name]}" for name in decided if not _equal(group, before, name)]
    if changed:
        logger.warning(
            "a group of %s goes on with the checkpoint's options: %s; set them in optimizer.param_groups after "
            "loading to have yours",
            group.get("role"),
            ", ".join(changed),
        )


def _equal(group: dict[str, Any], before: dict[str, Any], name: str) -> bool:
    theirs, ours = (tuple(value) if isinstance(value, list) else value for value in (group[name], before[name]))
    return theirs == ours
