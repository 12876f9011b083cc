"""One object per weights: rewards that name the same model share it.

In memory, and within a sum in computation. It is moved as a whole: `reward.to(...)` moves it for
all who share it.
"""

import threading
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import nn

__all__ = ["once", "stamp"]

B = TypeVar("B", bound=nn.Module)
_LOADED: WeakValueDictionary[Hashable, Any] = WeakValueDictionary()
_LOCK = threading.Lock()


def once(key: Hashable, make: Callable[[], B]) -> B:
    """Return what was made under this key and still lives, or make it.

    The global random state stays as it was, though modules draw weights
    before they get theirs.
    """
    with _LOCK:
        made = _LOADED.get(key)
        if made is None:
            with torch.random.fork_rng(devices=[]):
                made = _LOADED[key] = make()
        return made


def stamp(path: str | Path) -> tuple[Hashable, ...]:
    """Return what tells a file or a folder's files from those that were there before."""
    path = Path(path)
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    parts = [(str(f.resolve()), f.stat().st_mtime_ns, f.stat().st_size) for f in files]
    return tuple(parts)
