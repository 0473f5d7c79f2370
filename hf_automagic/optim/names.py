"""Names of parameters: what wrappers add to them, and whether a checkpoint's are those of the model at hand."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


def display_name(name: str) -> str:
    """Strips what torch.compile, FSDP, activation checkpointing and DDP add to a parameter's name."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS).removeprefix("module.")


def check_names(saved: Iterable[Mapping[str, Any]], own: Iterable[Mapping[str, Any]]) -> None:
    """Raises where a checkpoint's parameters are others than an optimizer's, or stand in another order.

    torch loads by position, so that a model with the same shapes would take over another's states without a word.
    Groups of which one side brings no names are compared by their shapes alone, as these come.

    Args:
        saved: param groups of a state_dict.
        own: the optimizer's.

    Raises:
        ValueError: with the first names that differ.
    """
    position = 0
    for theirs, ours in zip(saved, own, strict=False):
        names, expected = own_names(theirs), own_names(ours)
        if names and expected:
            for i, (name, other) in enumerate(itertools.zip_longest(names, expected)):
                if name is None or other is None or _bare(name) != _bare(other):
                    raise ValueError(
                        f"parameter {position + i} is {name or 'missing'} in the checkpoint and {other or 'missing'} "
                        "here: it belongs to another model, other adapters or another order; resume with the model "
                        "that was trained, or take 'names' and 'param_names' out of the file's groups to go by "
                        "position"
                    )
        position += len(ours["params"])


def own_names(group: Mapping[str, Any]) -> Sequence[str]:
    """Returns the names that a param group brings, none where it was built from bare parameters."""
    return group.get("param_names") or group.get("names") or ()


def _bare(name: str) -> str:
    """Returns a name without what wrappers and PEFT put in front of it."""
    return display_name(name).removeprefix("base_model.model.")
