"""The identity of a run: hashes of the files that it depends on, and differences between runs."""

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
"""Size of the largest file that is read whole, in bytes; number of blocks read of a larger one;
size of a block."""

LARGEST_HEADER = 100_000_000
"""Maximum size of a header of safetensors, in bytes."""

PIECE = 4096
"""Bytes at the start and at the end of each tensor that are read in a larger file of weights."""

_PLACES = [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")]
_PLACES += [Path(__file__).parent, Path(__file__).parents[1] / "rewards"]
"""Folders with code that is not the user's own: Python, installed packages, this package."""


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """Return the differences between two runs: dotted name -> both values, in full.

    For lists it is the first entry that differs.

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

    In the hub's cache a large file is named by its SHA-256, which is returned without reading the
    file. For any other file of more than `WHOLE` bytes, the size and a part of the content are
    hashed: for safetensors the header (names, shapes, precisions) and the first and the last
    `PIECE` bytes of each tensor, for other files `BLOCKS` evenly spaced blocks, including the
    first and the last.

    So training, another precision, a merged LoRA or an added row of an embedding change the hash.
    It misses manual changes of values in the middle of large tensors that leave both ends of each
    tensor unchanged.
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
    """Return offset and length of evenly spaced blocks of a file."""
    return [((size - BLOCK) * i // (BLOCKS - 1), BLOCK) for i in range(BLOCKS)]


def _tensors(file: BinaryIO, size: int) -> list[tuple[int, int]]:
    """Return offset and length of a safetensors header and of tensor ends; [] for other files."""
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
    """Return a Python file and its neighbours: files of its folder that it imports, or they do.

    A neighbour is `name.py` or the package `name/` in the same folder; of a package all files are
    returned.
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
    """Return the top-level names of a file's imports; none if it is not valid Python."""
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
    """Return the hashes of the user's own code that objects come from.

    These are their files, with the neighbours that these import. For the script that is run, or a
    notebook, only the text of the function or class is hashed, because the rest of the script may
    change.

    Args:
        made: functions, objects, and modules with their parts.
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
        except (TypeError, OSError):  # written in C, or typed interactively
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
