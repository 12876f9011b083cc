"""Say in words what values an option takes; jsonargparse's messages name Python's types."""

import re
from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

__all__ = ["reworded"]

WORDS: dict[Any, tuple[str, str]] = {
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    bool: ("true or false", "true or false"),
    str: ("a text", "texts"),
    Path: ("a path", "paths"),
}
"""Type -> a value of it, and several, in words."""


def reworded(message: str, hints: Mapping[str, Any]) -> str:
    r"""Return jsonargparse's message on a value of the wrong type in words; others as they are.

    Args:
        message: the message.
        hints: the types of the options, by name.

    >>> text = 'Parser key "steps": Expected a <class \'int\'>. Got value: 2.5'
    >>> reworded(text, {"steps": int})
    '--steps takes a whole number, got 2.5'
    """
    found = re.match(r'Parser key "([\w.]+)"', message)
    name = found[1] if found else ""
    if name not in hints:
        return message
    value = re.search(r".*(?:Given value|Got value): (?!NestedArg)(.*)$", message, re.DOTALL)
    got = f", got {value[1].strip()}" if value else ""
    return f"--{name.replace('_', '-')} takes {_takes(hints[name])}{got}"


def _takes(hint: Any) -> str:
    origin, inner = get_origin(hint), get_args(hint)
    if hint in WORDS:
        return WORDS[hint][0]
    if origin is Literal:
        return _either([str(value) for value in inner])
    if origin is list:
        several = WORDS[inner[0]][1] if inner[0] in WORDS else _takes(inner[0])
        return f"a list of {several} in brackets, [first, second]"
    if origin is dict or hint is dict:
        return "names with values in braces, {name: value}"
    return _either([_takes(part) for part in inner if part is not NoneType])


def _either(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
