"""Builds optimizers: the only code that turns a name, options and a model into an Automagic."""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from .config import AutomagicConfig, make_config, option_names, parse_option, preset_options
from .optim.automagic import Automagic
from .optim.loss_hook import attach_loss_hook
from .options import unknown_name_error
from .peft import group_by_name, param_groups
from .quantization import QuantizationStrategy
from .registry import get_optimizer_info

logger = logging.getLogger(__name__)

Trainable = nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]

# A text such as `optim_args` separates options with commas, so tuples are also reachable one number at a time.
TUPLE_ENTRIES = {f"{stem}{i + 1}": (name, i) for stem, name in (("beta", "betas"), ("eps", "eps")) for i in range(3)}


def create_automagic_optimizer(
    model: Trainable,
    optim: str = "automagic_8bit",
    *,
    lr: float = AutomagicConfig.lr,
    weight_decay: float = AutomagicConfig.weight_decay,
    new_modules: Iterable[str] = (),
    quantization_strategy: QuantizationStrategy | None = None,
    **options: Any,
) -> Automagic:
    """Creates an optimizer for a model, with its parameters grouped by their role.

    ```python
    optimizer = create_automagic_optimizer(model, lr=1e-4, loraplus_lr_ratio=4)
    ```

    Where `context` is on it listens to the losses in the model's outputs; a loss handed to `step` or `observe_loss`
    wins over these. The table of groups and true rates is logged at INFO, see `reporting.banner.show_banner_logs`.

    Args:
        model: a PEFT model, a plain model, or a list of parameters, (name, parameter) pairs or param groups. Only a
            model tells everything: LoRA's scalings, and which weights are pretrained or new.
        optim: a registered name, see `list_optimizers()`.
        lr: the rate where the optimizer does not tune it, and where `lr_search` starts; otherwise without effect.
        weight_decay: decoupled; not applied to biases, norms and magnitudes.
        new_modules: names of freshly initialised modules, which step at the adapters' rate.
        quantization_strategy: decides, parameter by parameter, what is stored in few bits.
        **options: options of `AutomagicConfig`, such as `loraplus_lr_ratio` or `max_lr`; `preset` names those of a
            preset of `config.PRESETS`, over which all others win.

    Raises:
        TypeError: an optimizer, option or module of this name does not exist; the nearest one is given.
        ValueError: an option is outside its bounds, or nothing is trainable.
    """
    options = {"lr": lr, "weight_decay": weight_decay, **options}
    cls, kwargs = optimizer_cls_and_kwargs(optim, options, model, new_modules=new_modules)
    optimizer = cls(**kwargs, quantization_strategy=quantization_strategy)
    if isinstance(model, nn.Module) and any(group["context"] for group in optimizer.param_groups):
        attach_loss_hook(model, optimizer)
    logger.info("%s", optimizer.describe())
    return optimizer


def optimizer_cls_and_kwargs(
    optim: str, options: Mapping[str, Any], model: Trainable | None = None, *, new_modules: Iterable[str] = ()
) -> tuple[type[Automagic], dict[str, Any]]:
    """Returns a class and its arguments, in the form of `Trainer(optimizer_cls_and_kwargs=...)`.

    Args:
        optim: a registered name.
        options: options of `AutomagicConfig`; they win over those of `preset`, and these over the registered ones.
        model: what to train, as for `create_automagic_optimizer`; without it there is no key `params`.
        new_modules: names of freshly initialised modules.

    Raises:
        TypeError: an optimizer, option or module of this name does not exist; the nearest one is given.
        ValueError: an option is outside its bounds, or nothing is trainable.
    """
    given = dict(options)
    kwargs = {**get_optimizer_info(optim).options, **preset_options(given.pop("preset", None)), **given}
    config = make_config(kwargs)
    if isinstance(model, nn.Module):
        groups = param_groups(model, weight_decay=config.weight_decay, new_modules=new_modules)
        return Automagic, {"params": groups, **kwargs}
    if tuple(new_modules):
        raise ValueError(f"new_modules needs the model itself, got {type(model).__name__}; pass the model")
    return Automagic, kwargs if model is None else {"params": _listed(model, config), **kwargs}


def _listed(params: Iterable[Any], config: AutomagicConfig) -> list[Any]:
    """Returns a list of tensors or groups as it is, and (name, parameter) pairs as groups."""
    params = list(params)
    if not params:
        raise ValueError("there is no parameter to optimise: the list is empty, or a generator that is used up")
    is_named = all(isinstance(entry, tuple) for entry in params)
    return group_by_name(params, weight_decay=config.weight_decay) if is_named else params


def parse_options(given: str | Mapping[str, Any] | None, base: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Reads options from a text such as `max_lr=3e-4, betas=0.9:0.99:0.999, factored=false`, or from a mapping.

    Texts are read by the option's type. Tuples are written with colons, or one number at a time as beta1, beta2,
    beta3, eps1, eps2 and eps3. `new_modules` lists names of modules with colons, `preset` names one of
    `config.PRESETS`.

    Args:
        given: what the user wrote.
        base: options that hold a tuple's other numbers where the user gives one; completed by AutomagicConfig's.

    Raises:
        TypeError: an option does not exist; the nearest one is given.
        ValueError: a part of the text is not `name=value`, a name occurs twice, or a value has the wrong type.
    """
    given = given if isinstance(given, Mapping) else _assignments(given or "")
    options: dict[str, Any] = {}
    for name, value in given.items():
        if name == "new_modules":
            options[name] = tuple(value.split(":")) if isinstance(value, str) else tuple(value)
        elif name == "preset":
            options[name] = str(value)
        elif name in option_names():
            options[name] = parse_option(name, value) if isinstance(value, str) else value
        elif name not in TUPLE_ENTRIES:
            raise unknown_name_error("option", name, (*option_names(), *TUPLE_ENTRIES, "new_modules", "preset"))
    for name in TUPLE_ENTRIES.keys() & given.keys():
        whole, place = TUPLE_ENTRIES[name]
        numbers = list(options.get(whole) or (base or {}).get(whole) or getattr(AutomagicConfig, whole))
        numbers[place] = _number(name, given[name])
        options[whole] = tuple(numbers)
    return options


def _assignments(text: str) -> dict[str, str]:
    options: dict[str, str] = {}
    for part in filter(None, map(str.strip, text.split(","))):
        name, equals, value = map(str.strip, part.partition("="))
        if not (name and equals and value) or "=" in value:
            raise ValueError(
                f"options must be name=value with commas between, got {part!r}; write tuples as betas=0.9:0.99:0.999"
            )
        if name in options:
            raise ValueError(f"option {name!r} is given twice, as {options[name]} and {value}; leave one")
        options[name] = value
    return options


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except ValueError as error:
        raise ValueError(f"option {name!r} does not read {value!r}; write a number") from error
