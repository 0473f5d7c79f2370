"""The door into transformers: every registered optimizer becomes a `TrainingArguments(optim=...)` string.

Three places of transformers hold what an `optim=` string needs: the enum OptimizerNames, the table of handlers (5.2)
and `Trainer.get_optimizer_cls_and_kwargs`. Each is opened at once where its module is loaded, otherwise when it loads:
importing this package must not cost what transformers.training_args does (4 seconds, peft and bitsandbytes included).
"""

import functools
import importlib
import importlib.abc
import importlib.machinery
import logging
import sys
import threading
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from torch import nn

from ..optim.automagic import Automagic
from ..registry import list_optimizers
from .training_arguments import cls_and_kwargs, optim_name

logger = logging.getLogger(__name__)

MARK = "_hf_automagic"  # on what we put into transformers

_LOCK = threading.Lock()


def register() -> None:
    """Makes the names of the registry known to transformers; may be called often, from any thread.

    A name that transformers has itself stays transformers'.
    """
    loaded = [(importlib.import_module(name), open_seam) for name, open_seam in SEAMS.items() if name in sys.modules]
    with _LOCK:
        if not any(isinstance(finder, _SeamFinder) for finder in sys.meta_path):
            sys.meta_path.insert(0, _SeamFinder())
        for module, open_seam in loaded:
            open_seam(module)


def unregister() -> None:
    """Takes everything out of transformers that `register()` put there."""
    with _LOCK:
        sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _SeamFinder)]
        if "transformers.training_args" in sys.modules:
            _remove_members(sys.modules["transformers.training_args"].OptimizerNames)
        handlers = _handlers(sys.modules.get("transformers.trainer_optimizer"))
        for name in [name for name, handler in handlers.items() if hasattr(handler, MARK)]:
            del handlers[name]
        if "transformers.trainer" in sys.modules:
            _unwrap_trainer(sys.modules["transformers.trainer"])


# The three seams.


def _add_members(module: ModuleType) -> None:
    """Adds our names to OptimizerNames as real members: the command line lists only those."""
    names = module.OptimizerNames
    for value in list_optimizers():
        if value not in names._value2member_map_:
            _add_member(names, value)
        elif not hasattr(names(value), MARK):
            logger.warning("transformers has an optim=%r, which stays; create_automagic_optimizer builds ours", value)


def _add_member(names: Any, value: str) -> None:
    member = str.__new__(names, value)
    member._name_, member._value_, member.__objclass__ = value.upper(), value, names
    member._sort_order_ = len(names._member_names_)
    # Pickled as the plain string, so that training_args.bin loads where this package is not installed.
    member.__reduce_ex__ = lambda protocol: (str, (value,))
    setattr(member, MARK, True)
    names._member_names_.append(member._name_)
    names._member_map_[member._name_] = names._value2member_map_[value] = member
    type.__setattr__(names, member._name_, member)


def _remove_members(names: Any) -> None:
    for name, member in list(names._member_map_.items()):
        if hasattr(member, MARK):
            names._member_names_.remove(name)
            del names._member_map_[name], names._value2member_map_[member._value_]
            type.__delattr__(names, name)


def _add_handlers(module: ModuleType) -> None:
    """Adds a handler for each of our names to the table of transformers 5.2 and later."""
    table = _handlers(module)
    for value in list_optimizers():
        if value not in table and _is_ours(module, value):
            table[value] = _handle


def _handlers(module: ModuleType | None) -> dict[str, Any]:
    return getattr(module, "_OPTIMIZER_HANDLERS", {})


def _handle(context: Any) -> tuple[type[Automagic], dict[str, Any]]:
    return cls_and_kwargs(context.args, context.model)


setattr(_handle, MARK, True)


def _wrap_trainer(module: ModuleType) -> None:
    """Wraps the two methods of Trainer that choose and build an optimizer."""
    trainer = module.Trainer
    if not hasattr(trainer.get_optimizer_cls_and_kwargs, MARK):
        trainer.get_optimizer_cls_and_kwargs = staticmethod(_answering(module, trainer.get_optimizer_cls_and_kwargs))
    if not hasattr(trainer.create_optimizer, MARK):
        trainer.create_optimizer = _caring(trainer.create_optimizer)


def _answering(module: ModuleType, original: Callable[..., Any]) -> Callable[..., Any]:
    """Answers for our names before transformers takes `optim_args` apart.

    transformers 4 has no table of handlers. transformers 5 splits optim_args at "," and "=" before it asks a handler,
    and answers a mapping or a forgotten "=" with an error that names neither the option nor the remedy.
    """

    @functools.wraps(original)
    def get_optimizer_cls_and_kwargs(args: Any, model: nn.Module | None = None) -> tuple[Any, dict[str, Any]]:
        if _is_ours(module, optim_name(args)):
            return cls_and_kwargs(args, model)
        return original(args, model)

    setattr(get_optimizer_cls_and_kwargs, MARK, get_optimizer_cls_and_kwargs)
    return get_optimizer_cls_and_kwargs


def _caring(original: Callable[..., Any]) -> Callable[..., Any]:
    """Looks after an Automagic that a Trainer builds: a handler sees the arguments, only the Trainer has the rest."""

    @functools.wraps(original)
    def create_optimizer(self: Any, *args: Any, **kwargs: Any) -> Any:
        from .trainers import create_optimizer_with_care

        return create_optimizer_with_care(self, original, *args, **kwargs)

    setattr(create_optimizer, MARK, create_optimizer)
    return create_optimizer


def _unwrap_trainer(module: ModuleType) -> None:
    """Puts the methods back, unless somebody else wrapped them after us and still calls ours."""
    trainer = module.Trainer
    for name, kind in (("get_optimizer_cls_and_kwargs", staticmethod), ("create_optimizer", lambda method: method)):
        ours = getattr(trainer, name)
        if getattr(ours, MARK, None) is ours:
            setattr(trainer, name, kind(ours.__wrapped__))


def _is_ours(module: ModuleType, value: str) -> bool:
    return hasattr(module.OptimizerNames._value2member_map_.get(value), MARK)


SEAMS: dict[str, Callable[[ModuleType], None]] = {
    "transformers.training_args": _add_members,
    "transformers.trainer_optimizer": _add_handlers,
    "transformers.trainer": _wrap_trainer,
}


class _SeamFinder(importlib.abc.MetaPathFinder):
    """Opens a seam in the moment in which transformers loads its module."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in SEAMS:
            return None
        for finder in sys.meta_path:
            find_spec = getattr(finder, "find_spec", None)
            spec = find_spec(fullname, path, target) if find_spec and not isinstance(finder, _SeamFinder) else None
            if spec is not None and spec.loader is not None:
                spec.loader = _SeamLoader(spec.loader, SEAMS[fullname])
                return spec
        return None


class _SeamLoader(importlib.abc.Loader):
    """Loads a module with its own loader, hands that one back to the module, and opens the seam."""

    def __init__(self, loader: Any, open_seam: Callable[[ModuleType], None]) -> None:
        self.loader = loader
        self.open_seam = open_seam

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        with _LOCK:
            self.open_seam(module)
