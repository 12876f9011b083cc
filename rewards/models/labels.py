"""The names of a classifier's classes: reading them, and matching them in any spelling."""

from collections.abc import Sequence
from pathlib import Path

__all__ = ["by_name", "listed", "plain"]


def listed(names: str | Path | Sequence[str]) -> list[str]:
    """Return the names of classes: those of a list, or of a file with one per line.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is empty.
    """
    if not isinstance(names, str | Path):
        return [str(name) for name in names]
    path = Path(names)
    if not path.is_file():
        raise FileNotFoundError(
            f"no file {str(names)!r}: give names= a text file with one class name per line"
        )
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    while lines and not lines[-1]:
        lines.pop()
    if not lines:
        raise ValueError(f"{str(names)!r} is empty: it must have one class name per line")
    return lines


def plain(name: str) -> str:
    """Return a name in the normal form in which names are compared.

    >>> plain("Tabby_Cat ")
    'tabby cat'
    """
    return " ".join(name.lower().replace("_", " ").split())


def by_name(names: Sequence[str]) -> dict[str, list[int]]:
    """Map plain names to classes; a whole name precedes a synonym ('tabby, tabby cat').

    >>> by_name(["tabby, tabby cat", "lynx"])["tabby"]
    [0]
    """
    whole: dict[str, list[int]] = {}
    part: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        whole.setdefault(plain(name), []).append(i)
        for synonym in name.split(","):
            part.setdefault(plain(synonym), []).append(i)
    return part | whole
