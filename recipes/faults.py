"""One-line messages for errors: the cause, and the line in a user's file if the error is there.

Internal errors of the program are not shortened: they are shown with their traceback.
"""

import errno
import linecache
import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path

from steer.names import reason
from steer.secrets import redacted

__all__ = ["explained", "place"]

EXPECTED = (ValueError, FloatingPointError, TypeError, ImportError, OSError)
"""The errors that the program raises for mistakes in its use."""

LONGEST = 2000


def explained(error: BaseException) -> str | None:
    """Return the message of an error; None for a fault of the program itself."""
    text = _explained(error)
    return None if text is None else redacted(text)


def _explained(error: BaseException) -> str | None:
    where = place(error)
    if _no_memory(error):
        return (
            "out of memory: reduce the size of a call (fewer particles or prompts; for finetune a "
            "smaller micro_batch), or use a device with more memory; finished parts are kept"
        )
    if isinstance(error, RecursionError) and where is None:
        return "an expression is nested too deeply: the limit is a hundred levels of brackets"
    if isinstance(error, EXPECTED):
        text = _of_the_system(error) if isinstance(error, OSError) else str(error)
        text = text.strip() or type(error).__name__
    elif where is None:
        return None
    elif isinstance(error, SyntaxError):
        text = f"{type(error).__name__}: {error.msg}"
    else:
        text = f"{type(error).__name__}: {reason(error)}"
    if len(text) > LONGEST:
        text = f"{text[:LONGEST]} ..."
    return text if where is None else f"{text} ({where})"


def place(error: BaseException) -> str | None:
    """Return the last line of a user's file in the traceback of an error or its causes."""
    found = None
    for one in _chain(error):
        if isinstance(one, SyntaxError) and one.filename and _is_users(one.filename):
            return _named(one.filename, one.lineno or 0)
        for frame in traceback.extract_tb(one.__traceback__):
            if _is_users(frame.filename):
                found = _named(frame.filename, frame.lineno or 0)
        if found is not None:
            break
    return found


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and its causes."""
    seen: set[int] = set()
    one: BaseException | None = error
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        yield one
        one = one.__cause__ or (None if one.__suppress_context__ else one.__context__)


def _named(file: str, line: int) -> str:
    text, path = linecache.getline(file, line).strip(), Path(file)
    if path.is_relative_to(Path.cwd()):
        path = path.relative_to(Path.cwd())
    return f"{path}, line {line}" + (f": {text}" if text else "")


_OURS = [Path(__file__).parents[1] / room for room in ("recipes", "rewards", "steer")]
_PYTHON = [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")]


def _is_users(file: str) -> bool:
    """Return whether a file belongs neither to this package nor to a library."""
    if file.startswith("<"):
        return False
    path = Path(file).absolute()
    return not any(path.is_relative_to(folder) for folder in (*_OURS, *_PYTHON))


def _no_memory(error: BaseException) -> bool:
    """Return whether memory ran out; on a CPU torch's error can only be recognised by its text."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error))
    )


def _of_the_system(error: OSError) -> str:
    if error.errno in {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}:
        return (
            f"the disk is full ({error.strerror}: {error.filename or 'while writing'}): no "
            "incomplete file is left; free some space and run the same command again: finished "
            "parts are kept"
        )
    if error.errno is None or error.strerror is None:
        return str(error)
    return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
