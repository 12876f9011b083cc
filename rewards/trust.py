"""What a reward's text may load: from a user any reward, from a data file only plain ones.

A dotted path may lead to code that is not a reward, so the object is inspected before it is
called. A text in a *file* (for example in adapters' metadata) is untrusted: nothing is imported,
run, opened or fetched because of it. A reward of the package is then made only if its weights are
on this machine, else it is refused.
"""

import inspect
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import nn

from rewards.catalogue import NAMES
from steer.reward import Reward

__all__ = [
    "LONGEST",
    "PLAIN",
    "is_plain",
    "may_fetch",
    "nothing_fetched",
    "refuse_fetch",
    "refuse_options",
    "refuse_shape",
    "refuse_size",
    "refuse_unknown",
]

LONGEST = 1000
"""Maximum length of a reward's text in a file."""

PLAIN = {
    "answer", "at", "axis", "by", "centre", "checkpoint", "compile", "condition", "contrast",
    "crop", "decay", "dtype", "flip", "name", "net", "noise", "output", "penalty", "pool",
    "quality", "question", "region", "seed", "sign", "size", "smooth", "soft", "target",
    "template", "threshold", "version", "views", "width",
}  # fmt: skip
"""Options whose values are numbers and words, so that none is a path or an address."""

IMAGES = {"batch", "image", "images", "img", "imgs", "pictures", "pixels", "x"}
"""Possible names of the first parameter of a reward that is given by a dotted path."""


# ------------------------------------------------------------------ a text from a file


def refuse_size(text: str) -> None:
    """Raise a ValueError for a text that is longer than the limit."""
    if len(text) > LONGEST:
        raise ValueError(f"it has {len(text)} letters, more than the limit of {LONGEST}")


def refuse_unknown(name: str) -> None:
    """Raise a ValueError for a name that is not a reward of the package."""
    if name not in NAMES or name == "remote":
        raise ValueError(f"{name[:60]!r} is not a reward of the package")


def refuse_options(options: Mapping[str, Any]) -> None:
    """Raise a ValueError for an option that may be a path, a URL or the name of a download."""
    for key, value in options.items():
        values = value if isinstance(value, list) else [value]
        if key not in PLAIN or not all(map(is_plain, values)):
            raise ValueError(f"the option {key[:60]!r} may name a file or a download")


def is_plain(value: Any) -> bool:
    """Return whether a value is a number or a word, and not the name of a file on this machine."""
    if not isinstance(value, str):
        return value is None or isinstance(value, bool | int | float)
    looks = value.startswith((".", "~")) or any(mark in value for mark in ("/", "\\", "\0"))
    return not looks and not os.path.lexists(value)


_FETCHES: ContextVar[bool] = ContextVar("_FETCHES", default=True)


@contextmanager
def nothing_fetched() -> Iterator[None]:
    """Make rewards only from files on this machine: `may_fetch` is false in this context."""
    token = _FETCHES.set(False)
    try:
        yield
    finally:
        _FETCHES.reset(token)


def may_fetch() -> bool:
    """Return whether missing weights may be downloaded."""
    return _FETCHES.get()


def refuse_fetch(reward: str, what: str) -> None:
    """Raise a ValueError if nothing may be fetched.

    Args:
        reward: the reward's name.
        what: the weights that are missing.
    """
    if not may_fetch():
        raise ValueError(f"the weights of {reward!r}, {what}, are not on this machine")


# ------------------------------------------------------------------ a dotted path


def refuse_shape(found: Any, name: str) -> None:
    """Raise a ValueError for an object that does not look like a reward. Nothing is called.

    Accepted are a `Reward`, another module or object that takes images, a class of these, and a
    Python function whose first parameter has a name that is used for images.
    """
    if isinstance(found, Reward) or (isinstance(found, type) and issubclass(found, Reward)):
        return
    if any(map(_takes_images, _calls(found))):
        return
    kind = "class" if isinstance(found, type) else type(found).__name__
    raise ValueError(
        f"{name!r} is not a reward but a {kind} that takes no images, so it was not called: a "
        "dotted path gives a steer.Reward, or a function f(images) or f(images, prompts) whose "
        "first parameter is called images; wrap it in a file of your own, file.py:Name"
    )


def _calls(found: Any) -> list[Any]:
    """Return the method of an object that would be called with images."""
    if inspect.isfunction(found):
        return [found]
    names = ["score"]
    if isinstance(found, nn.Module) or (isinstance(found, type) and issubclass(found, nn.Module)):
        names += ["forward", "update"]  # the latter for metrics
    elif not isinstance(found, type):
        names += ["__call__"]
    calls = [inspect.getattr_static(found, name, None) for name in names]
    return [call for call in calls if inspect.isfunction(call)]


def _takes_images(call: Any) -> bool:
    """Return whether a Python function's first parameter, after self, is named like images."""
    names = [
        p.name
        for p in inspect.signature(call).parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    return next((n for n in names if n != "self"), "") in IMAGES
