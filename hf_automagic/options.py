"""Options as data: a declared option validates, parses and documents itself."""

import dataclasses
import difflib
import functools
import math
from collections.abc import Iterable
from typing import Any, get_args, get_type_hints

_WORDS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}


def option(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[Any, ...] | None = None,
) -> Any:
    """Declares one option: its default, what it does and in which direction to turn it, and its bounds.

    Args:
        default: the value where the user says nothing.
        help: what the option does, its unit, its source, the direction to turn it.
        low: the smallest value allowed, inclusive; applies to every element of a tuple.
        high: the largest value allowed, inclusive.
        choices: the only values allowed.
    """
    return dataclasses.field(default=default, metadata={"help": help, "low": low, "high": high, "choices": choices})


def unknown_name_error(kind: str, name: str, valid: Iterable[str]) -> TypeError:
    """Builds the error for a name that does not exist, with the nearest one that does."""
    valid = sorted(valid)
    near = difflib.get_close_matches(name, valid, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(repr(n) for n in near)}?" if near else f"the names are: {', '.join(valid)}"
    return TypeError(f"there is no {kind} {name!r}; {hint}")


def parse_value(cls: type, name: str, text: str) -> Any:
    """Parses the text of one option of the dataclass `cls`, as it arrives from a command line or from `optim_args`.

    Tuples are written with colons (`1:5:10:25`), switches as true or false, an absent value as none.

    Raises:
        TypeError: there is no such option; the nearest one is named.
        ValueError: the text does not parse as the option's type.
    """
    hints = get_type_hints(cls)
    if name not in hints:
        raise unknown_name_error("option", name, hints)
    kinds = get_args(hints[name]) or (hints[name],)
    text = text.strip()
    try:
        if type(None) in kinds and text.lower() == "none":
            return None
        if bool in kinds:
            return _WORDS[text.lower()]
        if any(getattr(kind, "__origin__", kind) is tuple for kind in (hints[name], *kinds)):
            return tuple(_number(part) for part in text.strip("()[]").split(":") if part)
        if int in kinds and float not in kinds:
            return int(text)
        if float in kinds:
            return float(text)
    except (KeyError, ValueError) as error:
        raise ValueError(f"option {name!r} does not read {text!r}; {_spelling(hints[name])}") from error
    return text


def _number(text: str) -> float | int:
    return int(text) if text.strip().lstrip("-").isdigit() else float(text)


def _spelling(kind: Any) -> str:
    if kind is bool:
        return "write true or false"
    if "tuple" in str(kind):
        return "write numbers with colons between them, as in 1:5:10:25"
    return f"write a value of type {getattr(kind, '__name__', kind)}"


def check_bounds(record: Any) -> None:
    """Raises for the first option of a dataclass instance that is of another kind or outside its declared bounds.

    Raises:
        TypeError: a value has the wrong type.
        ValueError: a value lies outside its bounds or choices.
    """
    hints = _hints(type(record))
    for field in dataclasses.fields(record):
        value, rule = getattr(record, field.name), field.metadata
        if rule["choices"] is not None and value not in rule["choices"]:
            near = difflib.get_close_matches(str(value), [str(c) for c in rule["choices"]], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"{field.name} must be one of {', '.join(map(str, rule['choices']))}, got {value!r}{hint}"
            )
        kinds = get_args(hints[field.name]) or (hints[field.name],)
        if value is None and type(None) in kinds:
            continue
        if bool in kinds and not isinstance(value, bool):
            raise TypeError(f"{field.name} must be True or False, got {value!r}")
        if str in kinds and not isinstance(value, str):
            raise TypeError(f"{field.name} must be a name, got {value!r}")
        if rule["low"] is None and rule["high"] is None:
            continue
        for number in value if isinstance(value, (tuple, list)) else (value,):
            _check_number(field.name, number, rule["low"], rule["high"], is_whole=hints[field.name] is int)


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _check_number(name: str, number: Any, low: float | None, high: float | None, is_whole: bool) -> None:
    """Checks one number; only a bound that is declared as infinite lets infinity pass."""
    if isinstance(number, bool) or not hasattr(number, "__float__"):
        raise TypeError(f"{name} must be a number, got {number!r}")
    lowest, highest = -math.inf if low is None else low, math.inf if high is None else high
    if not lowest <= float(number) <= highest:
        raise ValueError(f"{name} must be between {lowest:g} and {highest:g}, got {number!r}")
    if high is None and math.isinf(float(number)):
        raise ValueError(f"{name} must be finite, got {number!r}")
    if is_whole and not float(number).is_integer():
        raise ValueError(f"{name} must be a whole number, got {number!r}")


def describe_options(cls: type) -> str:
    """Writes the table of a dataclass's options: name, default, bounds and what each does."""
    lines = []
    for field in dataclasses.fields(cls):
        rule = field.metadata
        bounds = ""
        if rule["choices"] is not None:
            bounds = f", one of {', '.join(map(str, rule['choices']))}"
        elif rule["low"] is not None or rule["high"] is not None:
            low, high = rule["low"], rule["high"]
            bounds = f", {f'at least {low:g}' if high is None else f'{low:g} to {high:g}'}"
        lines.append(f"    {field.name} (default {field.default!r}{bounds}): {rule['help']}")
    return "\n".join(lines)
