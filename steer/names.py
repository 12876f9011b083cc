"""What to say to a name that is not known."""

import difflib
from collections.abc import Iterable

__all__ = ["unknown"]


def unknown(kind: str, name: str, known: Iterable[str]) -> ValueError:
    """Return the error for an unknown name, with the nearest names and the whole list.

    >>> print(unknown("method", "fmt", ["none", "fmtt"]))
    unknown method 'fmt': did you mean fmtt? Known: fmtt, none
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return ValueError(f"unknown {kind} {name!r}: {hint}Known: {', '.join(names)}")
