"""One writer a folder: a lock that the kernel takes back when its holder dies, however it does."""

import errno
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["holder", "lock_of", "locked"]


def lock_of(folder: Path) -> Path:
    """Return the file beside a folder by which it is locked."""
    place = folder.resolve()
    return place.with_name(f".{place.name}.lock")


@contextmanager
def locked(folder: Path, file: Path | None = None) -> Iterator[None]:
    """Keep other processes from writing to a folder as long as the block runs.

    A process that was killed holds nothing: its file may lie there still, unlocked. Where the file
    system has no locks, nothing is held.

    Args:
        folder: what is written to; it need not be there yet.
        file: what is locked. Default: a hidden file beside the folder.

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
            file.unlink()  # before it is given back: see _taken
        os.close(descriptor)
        with suppress(OSError):
            for parent in made:
                parent.rmdir()  # as long as they are empty


def holder(file: Path) -> str | None:
    """Say who holds a lock, "process 12 on HOST"; None if no process does: then the file goes."""
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
    """Lock the file, made where it is missing, and return its descriptor."""
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        if not _flock(descriptor):
            os.close(descriptor)
            raise BlockingIOError(
                f"another process is writing to {folder} ({_who(file)}): wait until it is done, "
                "end it, or give another folder"
            )
        try:  # its last holder may have unlinked it since it was opened
            same = os.path.samestat(os.fstat(descriptor), os.stat(file))
        except OSError:
            same = False
        if same:
            note = json.dumps({"pid": os.getpid(), "host": socket.gethostname()})
            with suppress(OSError):  # on a full disk it holds all the same
                os.truncate(descriptor, 0)
                os.write(descriptor, note.encode())
            return descriptor
        os.close(descriptor)


def _flock(descriptor: int) -> bool:
    """Lock an open file if nobody has; True where there are no locks."""
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
