"""Checkpoints that survive kills, full disks and damage: written aside, synced, two are kept."""

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO

from steer.files import write_atomically

__all__ = ["BEFORE", "LAST", "Checkpoints", "kept", "usable"]

LAST, BEFORE, DAMAGED = "last.ckpt", "before.ckpt", "damaged.ckpt"
"""The last checkpoint, the one before it, and one that could not be read."""


class Checkpoints(CheckpointIO):
    """Lightning's checkpoint reading and writing, directly in the target folder.

    Lightning's own plugin writes them to the folder for temporary files, and copies them if that
    is on another file system: an interruption then damages the only checkpoint.

    Args:
        written: called when a checkpoint is complete.
    """

    def __init__(self, written: Callable[[], None] | None = None) -> None:
        self.written = written

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Write a checkpoint; the previous one is kept as `before.ckpt`."""
        file = Path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        fresh = file.with_name(f".{file.name}.{os.getpid()}.tmp")
        try:
            write_atomically(fresh, buffer.getvalue())
            if file.exists():
                os.replace(file, file.with_name(BEFORE))
            os.replace(fresh, file)
        finally:
            fresh.unlink(missing_ok=True)
        if self.written is not None:
            self.written()

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint; tensors only, no code."""
        return torch.load(path, map_location=map_location or "cpu", weights_only=True)

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a checkpoint."""
        Path(path).unlink(missing_ok=True)


def kept(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, the latest first."""
    return [folder / name for name in (LAST, BEFORE) if (folder / name).is_file()]


def usable(folder: Path) -> tuple[Path, int] | None:
    """Return the latest readable checkpoint and its step; None if there are no checkpoints.

    If the latest cannot be read, it is reported and renamed, and the one before it is used.

    Raises:
        ValueError: there are checkpoints, but none can be read.
    """
    files = kept(folder)
    wrong = []
    for file in files:
        try:
            step = int(torch.load(file, map_location="cpu", weights_only=True)["global_step"])
        except (OSError, MemoryError):
            raise
        except Exception as error:  # torch raises various errors for damaged files
            wrong.append(f"{file} is damaged ({_line(error)})")
            continue
        if wrong:
            print(f"{wrong[0]}: resuming from the one before it, step {step}")
            os.replace(folder / LAST, folder / DAMAGED)
            os.replace(file, folder / LAST)
        return folder / LAST if wrong else file, step
    if not files:
        return None
    raise ValueError(
        f"{'; '.join(wrong)}: no checkpoint is left to resume from. Copy one back, give another "
        "folder, or set overwrite to start again"
    )


def _line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return (text or [type(error).__name__])[0][:120]
