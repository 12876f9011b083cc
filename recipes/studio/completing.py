"""Completion of a reward's text while it is typed. It loads no network."""

import re
from collections.abc import Iterable

from rewards.catalogue import FUNCTIONS, NAMES

__all__ = ["completions"]

_LAST = re.compile(r"(?:^|[-+*(,])\s*(?P<word>[A-Za-z_]\w*)?\s*$")
"""The name that is being typed: behind a sign, a weight, a bracket or a comma, or at the start."""


def completions(text: str) -> list[str]:
    """Return whole texts in which the last name is one that there is; what is before it is kept.

    Names that begin as the last word does come first, then those that contain it. A text that
    ends in an option has none.

    >>> completions("0.7*clip + 0.3*sat"), completions("2*min(clip, brig")
    (['0.7*clip + 0.3*saturation'], ['2*min(clip, brightness'])
    >>> completions("colour:name=re"), completions("0.5")
    ([], [])
    """
    found = _LAST.search(text)
    if found is None:
        return []
    word = found["word"] or ""
    head = text[: found.start("word")] if word else text
    if word == "" and head and not head.endswith(" "):
        head += " " if head.rstrip()[-1] in "+-," else ""
    return [head + name for name in _fitting(word)]


def _fitting(word: str) -> Iterable[str]:
    names = [*sorted(NAMES), *(f"{name}(" for name in sorted(FUNCTIONS))]
    low = word.lower()
    first = [name for name in names if name.startswith(low)]
    return [*first, *(name for name in names if low in name and name not in first)]
