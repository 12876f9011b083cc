"""What to say to a name that is not known, and of an error that a library raised."""

import difflib
from collections.abc import Iterable

__all__ = ["hint", "reason", "unknown"]


def hint(name: str, known: Iterable[str]) -> str:
    """Return the nearest names as a question, or nothing.

    >>> hint("vertcal", ["vertical", "horizontal"])
    'did you mean vertical? '
    """
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}? " if near else ""


def reason(error: Exception) -> str:
    r"""Return the first line of what an error says, or the error itself where it says nothing.

    >>> reason(ValueError("no such file\nlook elsewhere")), reason(KeyError())
    ('no such file', 'KeyError()')
    """
    return (str(error).strip().splitlines() or [repr(error)])[0]


def unknown(kind: str, name: str, known: Iterable[str]) -> ValueError:
    """Return the error for an unknown name, with the nearest names and the whole list."""
    names = sorted(known)
    return ValueError(f"unknown {kind} {name!r}: {hint(name, names)}Known: {', '.join(names)}")
