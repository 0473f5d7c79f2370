"""What one of our strings makes of TrainingArguments: whose setting counts, what is refused and what is said."""

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..config import AutomagicConfig
from ..factory import TUPLE_ENTRIES, optimizer_cls_and_kwargs, parse_options
from ..optim.automagic import Automagic
from ..registry import get_optimizer_info
from ..reporting.banner import show_banner_logs

logger = logging.getLogger(__name__)

# Fields of TrainingArguments that mean Adam's numbers, and the option that comes nearest.
UNREAD = {"adam_beta1": "beta1", "adam_beta2": "beta2", "adam_epsilon": "eps3"}


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
    name, given = optim_name(args), _given_options(args)
    new_modules = given.pop("new_modules", ())
    _check_clipping(args, given)
    options = {"lr": args.learning_rate, "weight_decay": args.weight_decay, **given}
    cls, kwargs = optimizer_cls_and_kwargs(name, options, model, new_modules=new_modules)
    if args.should_log:
        show_banner_logs()
        _warn_of_unread(args, name, kwargs)
    return cls, kwargs


def optim_name(args: Any) -> str:
    """Returns the `optim=` string of TrainingArguments."""
    return _text(args.optim)


def describe_law(args: Any) -> str:
    """Says in a line which of the user's settings became what, for one of our strings."""
    given = _given_options(args)
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
    schedule = f"the {_text(args.lr_scheduler_type)} schedule multiplies the rate"
    return f"optim={optim_name(args)}: {', '.join(taken)}; adam_* are not read; {clip}; {schedule}."


def _text(member: Any) -> str:
    return str(getattr(member, "value", member))


def _given_options(args: Any) -> dict[str, Any]:
    return parse_options(args.optim_args, get_optimizer_info(optim_name(args)).options)


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
