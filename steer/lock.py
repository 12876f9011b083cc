"""One writer per folder: a lock that the kernel releases when its holder ends in any way."""

import errno
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["holder", "lock_of", "locked"]


def lock_of(folder: Path) -> Path:
    """Return the lock file of a folder, which is next to it."""
    place = folder.resolve()
    return place.with_name(f".{place.name}.lock")


@contextmanager
def locked(folder: Path, file: Path | None = None) -> Iterator[None]:
    """Keep other processes from writing to a folder while the block runs.

    A killed process holds no lock, although its lock file may still exist. On a file system
    without locks, nothing is locked.

    Args:
        folder: the folder that is written to; it need not exist yet.
        file: the file to lock. Default: a hidden file next to the folder.

    Raises:
        BlockingIOError: another process writes to the folder; the message says which.
    """
    file = lock_of(folder) if file is None else file
    made = [parent for parent in file.parents if not parent.exists()]
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = _taken(folder, file)
    try:
        yield
    finally:
        with suppress(OSError):
            file.unlink()  # before the lock is released: see _taken
        os.close(descriptor)
        with suppress(OSError):
            for parent in made:
                parent.rmdir()  # only if they are empty


def holder(file: Path) -> str | None:
    """Return a lock's holder, "process 12 on HOST"; without one delete it and return None."""
    try:
        descriptor = os.open(file, os.O_RDWR)
    except OSError:
        return None
    try:
        if not _flock(descriptor):
            return _who(file)
        with suppress(OSError):
            file.unlink()
        return None
    finally:
        os.close(descriptor)


def _taken(folder: Path, file: Path) -> int:
    """Lock the file, creating it if it is missing, and return its descriptor."""
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        if not _flock(descriptor):
            os.close(descriptor)
            raise BlockingIOError(
                f"another process is writing to {folder} ({_who(file)}): wait until it is done, "
                "end it, or give another folder"
            )
        try:  # its last holder may have deleted it since it was opened
            same = os.path.samestat(os.fstat(descriptor), os.stat(file))
        except OSError:
            same = False
        if same:
            note = json.dumps({"pid": os.getpid(), "host": socket.gethostname()})
            with suppress(OSError):  # the lock also holds on a full disk
                os.truncate(descriptor, 0)
                os.write(descriptor, note.encode())
            return descriptor
        os.close(descriptor)


def _flock(descriptor: int) -> bool:
    """Lock an open file if it is not locked; True where locks are not supported."""
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in {errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES}
    return True


def _who(file: Path) -> str:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return f"process {int(found['pid'])} on {str(found['host'])[:80]}"
    except (OSError, ValueError, KeyError, TypeError):
        return "of unknown number"
