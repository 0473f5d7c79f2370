"""State dictionaries that note what is put into them: a step need not look at each of their tensors again."""

import copy
import dataclasses
import functools
import itertools
import operator
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from typing import Any

from torch import Tensor


@dataclasses.dataclass(eq=False)
class Note:
    """What the entries of an optimizer have in common; it holds none of them, so that they are freed with it."""

    is_touched: bool = True


class WatchedState(dict[str, Tensor]):
    """What `optimizer.state[p]` is where we made it: a dictionary that notes every change; copies are plain ones."""

    note = Note()  # of one that nobody watches

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles as what loads with torch's `weights_only`."""
        return OrderedDict, (list(self.items()),)

    def __copy__(self) -> dict[str, Tensor]:
        """Copies as a plain dictionary."""
        return dict(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Tensor]:
        """Copies as a plain dictionary."""
        return copy.deepcopy(dict(self), memo)


def _noting(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def change(self: WatchedState, *args: Any, **kwargs: Any) -> Any:
        self.note.is_touched = True
        return method(self, *args, **kwargs)

    return change


for _name in ("__delitem__", "__ior__", "__setitem__", "clear", "pop", "popitem", "setdefault", "update"):
    setattr(WatchedState, _name, _noting(getattr(dict, _name)))


def watch_entries(state: MutableMapping[Any, Any]) -> None:
    """Turns the entries of an `optimizer.state` that nobody else holds, as after a load, into watched ones."""
    for param, entry in state.items():
        if isinstance(entry, dict) and not isinstance(entry, WatchedState):
            state[param] = WatchedState(entry)


class StateWatch:
    """Tells whether `optimizer.state` still holds what the buckets have put there.

    Dictionaries that somebody else has put there stay what they are; their tensors are looked at one by one.
    """

    def __init__(self) -> None:
        """Watches nothing yet."""
        self.note = Note()
        self.entries: list[Mapping[str, Tensor]] = []
        self.unwatched: list[Mapping[str, Tensor]] = []
        self.tensors: list[Tensor] = []

    def begin(self, state: Mapping[Tensor, Mapping[str, Tensor]]) -> None:
        """Watches all entries as they are now."""
        self.entries, self.unwatched = list(state.values()), []
        for entry in self.entries:
            if isinstance(entry, WatchedState):
                entry.note = self.note
            elif isinstance(entry, Mapping):  # others may keep what they like beside the parameters' entries
                self.unwatched.append(entry)
        self.tensors, self.note.is_touched = _tensors(self.unwatched), False

    def holds(self, state: Mapping[Tensor, Mapping[str, Tensor]]) -> bool:
        """Whether nothing was put into an entry, or in its place."""
        if self.note.is_touched or not are_same(list(state.values()), self.entries):
            return False
        return not self.unwatched or are_same(_tensors(self.unwatched), self.tensors)


def _tensors(entries: Iterable[Mapping[str, Tensor]]) -> list[Tensor]:
    return list(itertools.chain.from_iterable(entry.values() for entry in entries))


def are_same(some: list[Any], others: list[Any]) -> bool:
    """Whether two lists hold the very same things; tensors are not compared."""
    return len(some) == len(others) and all(map(operator.is_, some, others))
