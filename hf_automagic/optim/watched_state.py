"""State dictionaries that note what is put into them: a step need not look at each of their tensors again."""

import dataclasses
import functools
import operator
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

from torch import Tensor


@dataclasses.dataclass(eq=False)
class Note:
    """What the entries of an optimizer have in common; it holds none of them, so that they are freed with it."""

    is_touched: bool = True


class StateWatch:
    """Tells whether `optimizer.state` still holds what the buckets have put there."""

    def __init__(self) -> None:
        """Watches nothing yet."""
        self.note = Note()
        self.entries: list[dict[str, Tensor]] = []

    def begin(self, state: MutableMapping[Tensor, dict[str, Tensor]]) -> None:
        """Watches all entries as they are now."""
        for param, entry in state.items():
            watched = entry if isinstance(entry, WatchedState) else WatchedState(entry)
            watched.note = self.note
            state[param] = watched
        self.entries, self.note.is_touched = list(state.values()), False

    def holds(self, state: Mapping[Tensor, dict[str, Tensor]]) -> bool:
        """Whether nothing was put into an entry, or in its place."""
        unlike = self.note.is_touched or len(state) != len(self.entries)
        return not unlike and all(map(operator.is_, state.values(), self.entries))


class WatchedState(dict[str, Tensor]):
    """What `optimizer.state[p]` is: a dictionary that notes every change; its copies are plain ones."""

    __slots__ = ("note",)
    note: Note

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles and copies as a plain dictionary."""
        return dict, (dict(self),)


def _noting(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def change(self: WatchedState, *args: Any, **kwargs: Any) -> Any:
        self.note.is_touched = True
        return method(self, *args, **kwargs)

    return change


for _name in ("__delitem__", "__ior__", "__setitem__", "clear", "pop", "popitem", "setdefault", "update"):
    setattr(WatchedState, _name, _noting(getattr(dict, _name)))
