"""The door into transformers: every registered optimizer becomes a `TrainingArguments(optim=...)` string.

Three places of transformers hold what an `optim=` string needs: the enum OptimizerNames, the table of handlers (5.x)
and `Trainer.get_optimizer_cls_and_kwargs`. Each is opened at once where its module is loaded, otherwise when it loads:
importing this package must not cost what transformers.training_args does (4 seconds, peft and bitsandbytes included).
"""

import contextlib
import dataclasses
import functools
import importlib
import importlib.abc
import importlib.machinery
import logging
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

from torch import nn

from ..config import AutomagicConfig
from ..factory import TUPLE_ENTRIES, optimizer_cls_and_kwargs, parse_options
from ..optim import groups
from ..optim.automagic import Automagic
from ..registry import get_optimizer_info, list_optimizers

logger = logging.getLogger(__name__)

MARK = "_hf_automagic"  # on what we put into transformers
# Fields of TrainingArguments that mean Adam's numbers, and the option that comes nearest.
UNREAD = {"adam_beta1": "beta1", "adam_beta2": "beta2", "adam_epsilon": "eps3"}

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


def cls_and_kwargs(args: Any, model: nn.Module | None = None) -> tuple[type[Automagic], dict[str, Any]]:
    """Answers for `Trainer.get_optimizer_cls_and_kwargs`: the class, and its arguments with our groups as `params`.

    learning_rate and weight_decay are TrainingArguments', adam_* are not read, max_grad_norm stays the Trainer's where
    optim_args lacks it, and optim_args beats all.

    Args:
        args: TrainingArguments; its optim_args may be a text or a mapping.
        model: what to train; without it there is no key `params`, and the caller groups the parameters.

    Raises:
        TypeError: an option does not exist; the nearest one is given.
        ValueError: an option does not parse or is out of bounds, two places clip gradients, or nothing is trainable.
    """
    name = _name(args.optim)
    given = parse_options(args.optim_args, get_optimizer_info(name).options)
    new_modules = given.pop("new_modules", ())
    _check_clipping(args, given)
    options = {"lr": args.learning_rate, "weight_decay": args.weight_decay, **given}
    cls, kwargs = optimizer_cls_and_kwargs(name, options, model, new_modules=new_modules)
    if args.should_log:
        _let_be_seen()
        _warn_of_unread(args, name, kwargs)
    if args.should_log and model is not None:
        logger.info("%s\n%s", _law(args, name, given), _preview(cls, kwargs))
    return cls, kwargs


def _name(optim: Any) -> str:
    return str(getattr(optim, "value", optim))


def _check_clipping(args: Any, given: Mapping[str, Any]) -> None:
    if given.get("max_grad_norm") and args.max_grad_norm:
        raise ValueError(
            f"max_grad_norm={given['max_grad_norm']:g} in optim_args clips inside the step, and the Trainer's own "
            f"max_grad_norm={args.max_grad_norm:g} before it; set the Trainer's to 0, or leave the option out"
        )


def _warn_of_unread(args: Any, name: str, options: Mapping[str, Any]) -> None:
    defaults = {field.name: field.default for field in dataclasses.fields(args)}
    for field, option in UNREAD.items():
        value, (whole, place) = getattr(args, field), TUPLE_ENTRIES[option]
        if value not in (defaults[field], options.get(whole, getattr(AutomagicConfig, whole))[place]):
            remedy = f"{option}={value:g}"
            logger.warning("%s=%g is Adam's, %s does not read it; write optim_args=%r", field, value, name, remedy)


def _law(args: Any, name: str, given: Mapping[str, Any]) -> str:
    """Says in a line which of the user's settings became what."""
    fields = {"lr": "learning_rate", "weight_decay": "weight_decay"}
    taken = [
        f"{option} {getattr(args, field):g} from {field}" for option, field in fields.items() if option not in given
    ]
    taken += [f"{option} {value} from optim_args" for option, value in given.items()]
    clip = (
        f"the Trainer clips to max_grad_norm {args.max_grad_norm:g}"
        if args.max_grad_norm
        else "the Trainer clips nothing"
    )
    schedule = f"the {_name(args.lr_scheduler_type)} schedule multiplies the rate"
    return f"optim={name}: {', '.join(taken)}; adam_* are not read; {clip}; {schedule}."


def _preview(cls: type[Automagic], kwargs: Mapping[str, Any]) -> str:
    """Describes the optimizer that the Trainer is about to build; what that one warns of is not said twice."""
    with _muted(groups.logger):
        return cls(**kwargs).describe()


@contextlib.contextmanager
def _muted(which: logging.Logger) -> Iterator[None]:
    which.disabled, before = True, which.disabled
    try:
        yield
    finally:
        which.disabled = before


class _ScriptHandler(logging.StreamHandler):
    """Shows our INFO lines on stderr while the program has set up no logging of its own."""

    def emit(self, record: logging.LogRecord) -> None:
        if not logging.getLogger().handlers:
            super().emit(record)


def _let_be_seen() -> None:
    """Makes the banner visible in a plain script; a program that has set up logging is left as it is."""
    package = logging.getLogger(__name__.partition(".")[0])
    if not (package.handlers or package.level or logging.getLogger().handlers):
        package.addHandler(_ScriptHandler())
        package.setLevel(logging.INFO)


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
    """Adds a handler for each of our names to the table of transformers 5."""
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
    """Answers for our names before transformers takes `optim_args` apart.

    transformers 4 has no table of handlers. transformers 5 splits optim_args at "," and "=" before it asks a handler,
    and answers a mapping or a forgotten "=" with an error that names neither the option nor the remedy.
    """
    original = module.Trainer.get_optimizer_cls_and_kwargs
    if hasattr(original, MARK):
        return

    @functools.wraps(original)
    def get_optimizer_cls_and_kwargs(args: Any, model: nn.Module | None = None) -> tuple[Any, dict[str, Any]]:
        if _is_ours(module, _name(args.optim)):
            return cls_and_kwargs(args, model)
        return original(args, model)

    setattr(get_optimizer_cls_and_kwargs, MARK, True)
    module.Trainer.get_optimizer_cls_and_kwargs = staticmethod(get_optimizer_cls_and_kwargs)


def _unwrap_trainer(module: ModuleType) -> None:
    ours = module.Trainer.get_optimizer_cls_and_kwargs
    if hasattr(ours, MARK):
        module.Trainer.get_optimizer_cls_and_kwargs = staticmethod(ours.__wrapped__)


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
