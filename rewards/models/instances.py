"""One object per set of weights: rewards that name the same model share it.

They share its memory and, within a sum, its computation. `reward.to(...)` moves it for all rewards
that share it.
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
    """Return the object that was made under this key, if it still exists; else make it.

    The global random state is restored, because modules are initialised at random before their
    weights are loaded.
    """
    with _LOCK:
        made = _LOADED.get(key)
        if made is None:
            with torch.random.fork_rng(devices=[]):
                made = _LOADED[key] = make()
        return made


def stamp(path: str | Path) -> tuple[Hashable, ...]:
    """Return a stamp of a file, or of a folder's files, that changes when they are replaced."""
    path = Path(path)
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    parts = [(str(f.resolve()), f.stat().st_mtime_ns, f.stat().st_size) for f in files]
    return tuple(parts)
