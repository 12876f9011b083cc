"""Run a user's Python file, named as `file.py:Name`, so that it can import its neighbours."""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from steer.identity import python_files
from steer.names import hint

__all__ = ["from_file", "split_place"]

_FOLDERS: list[str] = []
"""The folders of files that have been run."""


def split_place(text: str) -> tuple[Path, str] | None:
    """Return the file and the name of "file.py:Name"; None for a text of another form.

    >>> split_place("my/flows.py:Mine"), split_place("emoji")
    ((PosixPath('my/flows.py'), 'Mine'), None)
    """
    file, _, name = text.rpartition(":")
    return (Path(file), name) if file.endswith(".py") else None


def from_file(file: Path, name: str) -> Any:
    """Run a Python file and return the object `name` of it.

    Its folder is first in the import path while it runs, as with `python file.py`, and last
    afterwards.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file has no such name; the message has the nearest ones.
    """
    if not file.is_file():
        raise FileNotFoundError(f"no file {file}: give the path of a Python file, as file.py:Name")
    key = f"_steer_file_{file.resolve().as_posix().replace('/', '_').replace('.', '_')}"
    spec = importlib.util.spec_from_file_location(key, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[key] = module
    with _neighbours(file.resolve()):
        spec.loader.exec_module(module)
    if not hasattr(module, name):
        public = [n for n in vars(module) if not n.startswith("_")]
        near = hint(name, public)
        has = f"{near}It has {', '.join(public)}" if public else "it defines no public names"
        raise ValueError(f"{file} defines no {name!r}: {has}")
    return getattr(module, name)


@contextmanager
def _neighbours(file: Path) -> Iterator[None]:
    """Let a file import modules of its own folder, and not those of another file's folder."""
    folder = str(file.parent)
    for near in python_files(file)[1:]:
        loaded = getattr(sys.modules.get(near.stem), "__file__", None)
        if loaded and Path(loaded) != near and str(Path(loaded).parent) in _FOLDERS:
            del sys.modules[near.stem]
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
        if folder not in sys.path:
            sys.path.append(folder)
        if folder not in _FOLDERS:
            _FOLDERS.append(folder)
