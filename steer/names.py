"""Errors for unknown names, aliases for moved modules, durations in words."""

import difflib
import importlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["duration", "hint", "moved", "reason", "unknown"]


def hint(name: str, known: Iterable[str]) -> str:
    """Return the nearest names as a question, or nothing.

    >>> hint("vertcal", ["vertical", "horizontal"])
    'did you mean vertical? '
    """
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}? " if near else ""


def reason(error: BaseException) -> str:
    r"""Return the first line of an error's message, or the error's repr if it has no message.

    >>> reason(ValueError("no such file\nlook elsewhere")), reason(KeyError())
    ('no such file', 'KeyError()')
    """
    return (str(error).strip().splitlines() or [repr(error)])[0]


def unknown(
    kind: str, name: str, known: Iterable[str], renamed: Mapping[str, str] | None = None
) -> ValueError:
    """Return the error for an unknown name, with the nearest names and the whole list.

    >>> print(unknown("method", "fmt", ["none", "fmtt"]))
    unknown method 'fmt': did you mean fmtt? Known: fmtt, none
    >>> print(unknown("setting", "clip", ["gradient_clip"], {"clip": "gradient_clip"}))
    unknown setting 'clip': it is called gradient_clip now. Known: gradient_clip

    Args:
        kind: the kind of thing that the name is for.
        name: the name.
        known: the existing names.
        renamed: earlier names -> current names.
    """
    names = sorted(known)
    today = (renamed or {}).get(name)
    near = hint(name, names) if today is None else f"it is called {today} now. "
    return ValueError(f"unknown {kind} {name!r}: {near}Known: {', '.join(names)}")


def moved(package: str, homes: Mapping[str, Sequence[str]]) -> None:
    """Keep old module names of a package importable, without loading the new modules yet.

    Args:
        package: the package's name.
        homes: old module name -> the modules that now define its names.
    """
    own = sys.modules[package]
    for old, modules in homes.items():
        name = f"{package}.{old}"
        sys.modules[name] = _Moved(name, modules)
        if old not in getattr(own, "__all__", ()):  # the package may have a function of that name
            setattr(own, old, sys.modules[name])


class _Moved(ModuleType):
    """A module that moved: its names are looked up in the new modules."""

    def __init__(self, name: str, homes: Sequence[str]) -> None:
        super().__init__(name, f"Moved to {' and '.join(homes)}.")
        self.__spec__ = ModuleSpec(name, None)
        self._homes = homes

    def __getattr__(self, name: str) -> Any:
        if name == "__all__":  # `from package.old import *`
            homes = [importlib.import_module(home) for home in self._homes]
            return [public for module in homes for public in module.__all__]
        if not name.startswith("__"):
            for home in self._homes:
                module = importlib.import_module(home)
                if hasattr(module, name):
                    return getattr(module, name)
        raise AttributeError(f"{self.__name__} moved to {' and '.join(self._homes)}: no {name!r}")


def duration(seconds: float) -> str:
    """Return a duration as a readable text.

    >>> duration(7.4), duration(95), duration(7300)
    ('7 s', '1 min 35 s', '2 h 1 min')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
