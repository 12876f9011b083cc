"""What makes a run this one and no other: the files behind it, and what differs between two."""

import ast
import functools
import hashlib
import inspect
import json
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from torch import nn

__all__ = ["changes", "file_hash", "python_files", "sources"]

WHOLE, BLOCKS, BLOCK = 1 << 28, 256, 1 << 16
"""Bytes of the largest file that is read whole; how many blocks of one that is larger; of what
size."""

LARGEST_HEADER = 100_000_000
"""Bytes of the longest header that safetensors allows."""

PIECE = 4096
"""Bytes at a tensor's beginning and at its end that are read in a larger file of weights."""

_PLACES = [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")]
_PLACES += [Path(__file__).parent, Path(__file__).parents[1] / "rewards"]
"""Where code is nobody's own: Python's, installed packages', ours."""


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """Return what differs between two runs: the dotted name -> both values, in full.

    Of long lists that is their first entry that differs.

    >>> changes({"steps": 3, "a": {"b": [1, 2]}}, {"steps": 4, "a": {"b": [1, 3]}})
    {'steps': '3 -> 4', 'a.b[1]': '2 -> 3'}
    """
    return dict(_changed("", before, now))


def _changed(name: str, old: Any, new: Any) -> Iterator[tuple[str, str]]:
    if old == new:
        return
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in dict.fromkeys([*old, *new]):
            yield from _changed(f"{name}.{key}" if name else str(key), old.get(key), new.get(key))
    elif isinstance(old, list) and isinstance(new, list):
        if len(old) != len(new):
            yield name, f"{len(old)} entries -> {len(new)} entries"
        for i, (a, b) in enumerate(zip(old, new, strict=False)):
            if a != b:
                yield from _changed(f"{name}[{i}]", a, b)
                return
    else:
        yield name, " -> ".join(json.dumps(v, ensure_ascii=False) for v in (old, new))


def file_hash(file: Path) -> str:
    """Return the SHA-256 of a file's content, without reading all of large weights.

    In the hub's cache a large file is named by its SHA-256: there that is taken, and nothing read.
    Of another one of more than `WHOLE` bytes it is the hash of its size and of a part of it: of
    safetensors the header (names, shapes, precisions) and the first and the last `PIECE` bytes of
    each tensor, of other files `BLOCKS` blocks, evenly spaced from the first to the last.

    So training, another precision, a merged LoRA or an added row of an embedding give another
    hash. What is missed: values in the middle of large tensors that were changed by hand, where
    all first and last ones stayed as they were.
    """
    stored = file.resolve()
    if stored.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", stored.name):
        return stored.name
    size = file.stat().st_size
    with file.open("rb") as opened:
        if size <= WHOLE:
            return hashlib.file_digest(opened, "sha256").hexdigest()
        digest = hashlib.sha256(str(size).encode())
        for first, length in _tensors(opened, size) or _spread(size):
            opened.seek(first)
            digest.update(opened.read(length))
        return digest.hexdigest()


def _spread(size: int) -> list[tuple[int, int]]:
    """Return where blocks of a file are, evenly spaced, and how long they are."""
    return [((size - BLOCK) * i // (BLOCKS - 1), BLOCK) for i in range(BLOCKS)]


def _tensors(file: BinaryIO, size: int) -> list[tuple[int, int]]:
    """Return where the header of safetensors and the ends of its tensors are; none of others."""
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= min(LARGEST_HEADER, size - 8):
        return []
    try:
        header = json.loads(file.read(length))
        ends = sorted(
            one["data_offsets"] for name, one in header.items() if name != "__metadata__"
        )
        found = [(0, 8 + length)]
        for first, last in ends:
            if not 0 <= first <= last <= size:
                return []
            part = min(PIECE, last - first)
            found += [(8 + length + first, part), (8 + length + last - part, part)]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return []
    return found


def python_files(file: Path) -> list[Path]:
    """Return a Python file and its neighbours: what it imports, directly or not, from its folder.

    A neighbour is `name.py` or the package `name/` beside it; of a package all files count.
    """
    found: dict[Path, None] = {}
    left = [file]
    while left:
        one = left.pop()
        if one in found or not one.is_file():
            continue
        found[one] = None
        for name in _imported(one):
            beside = file.parent / name
            left.append(beside.with_name(f"{name}.py"))
            if beside.is_dir():
                left += sorted(beside.rglob("*.py"))
    return list(found)


def _imported(file: Path) -> set[str]:
    """Return the first names of all that a file imports; none where it is no Python."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, RecursionError):
        return set()
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.partition(".")[0])
        elif isinstance(node, ast.ImportFrom):  # from . import name
            names |= {alias.name for alias in node.names}
    return names


def sources(*made: Any, files: Iterable[Path] = ()) -> dict[str, str]:
    """Return the hashes of the code that objects come from, where it is the user's own.

    That is their files with the neighbours they import. Of what stands in the script that is run,
    or in a notebook, it is the text of the function or class alone: the script may change beside.

    Args:
        made: functions, objects, modules with what they are made of.
        files: more files: pictures, lists.

    Returns:
        File name, or the name in the script -> SHA-256.
    """
    hashes: dict[str, str] = {}
    found: dict[Path, None] = dict.fromkeys(file.resolve() for file in files)
    for one in _parts(made):
        home = getattr(one, "__module__", None)
        try:
            if home == "__main__" or "ipykernel" in str(inspect.getsourcefile(one)):
                text = inspect.getsource(one)
                hashes[one.__qualname__] = hashlib.sha256(text.encode()).hexdigest()
                continue
            file = Path(str(inspect.getsourcefile(one))).resolve()
        except (TypeError, OSError):  # written in C, or typed at a prompt
            continue
        if file.is_file() and not any(file.is_relative_to(place) for place in _PLACES):
            found |= dict.fromkeys(python_files(file))
    for file in found:
        named = [other for other in found if other.name == file.name]
        name = file.name if len(named) == 1 else f"{file.parent.name}/{file.name}"
        hashes[name] = file_hash(file)
    return dict(sorted(hashes.items()))


def _parts(made: Iterable[Any]) -> Iterator[Any]:
    """Yield the functions and classes that objects come from, each once."""
    seen: set[int] = set()
    left = list(made)
    while left:
        one = left.pop()
        if id(one) in seen or one is None:
            continue
        seen.add(id(one))
        if isinstance(one, functools.partial):
            left.append(one.func)
        elif inspect.ismethod(one):
            left.append(one.__self__)
        elif inspect.isfunction(one):
            one = inspect.unwrap(one)
            cells = [c.cell_contents for c in one.__closure__ or () if _filled(c)]
            left += [c for c in cells if callable(c)]
            yield one
        elif inspect.isclass(one):
            yield from (kind for kind in one.__mro__ if kind.__module__ in sys.modules)
        else:
            left.append(type(one))
            if isinstance(one, nn.Module):
                left += [*one.children(), getattr(one, "f", None)]


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False
