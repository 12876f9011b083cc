"""Files and folders that are whole or not there, and what is written into them."""

import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

__all__ = [
    "numbers",
    "pack",
    "peak_memory",
    "read_notes",
    "refuse_existing",
    "slug",
    "whole_folder",
    "write_atomically",
]


@contextmanager
def whole_folder(folder: Path, overwrite: bool = False) -> Iterator[Path]:
    """Give a scratch folder that becomes `folder` when the block ends well, and else vanishes.

    Raises:
        FileExistsError: the folder exists, and `overwrite` is not set.
    """
    refuse_existing(folder, overwrite)
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        scratch.chmod(0o755)
        yield scratch
        refuse_existing(folder, overwrite)  # somebody may have made it meanwhile
        if not folder.exists():
            os.replace(scratch, folder)
            return
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
        os.replace(folder, aside / folder.name)
        try:
            os.replace(scratch, folder)
        except OSError:
            os.replace(aside / folder.name, folder)
            raise
        finally:
            shutil.rmtree(aside)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def refuse_existing(folder: Path, overwrite: bool) -> None:
    """Raise if there is something that would be overwritten unasked."""
    if folder.exists() and not overwrite:
        raise FileExistsError(
            f"{folder} exists already, and is left as it is: choose another folder, or say "
            "overwrite (--overwrite on the command line)"
        )


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file that is there whole or not at all, whatever happens."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with scratch.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def pack(tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> bytes:
    """Return a safetensors file: tensors, and notes (JSON values) that `read_notes` reads."""
    texts = {"format": "pt"}
    for name, value in notes.items():
        own = isinstance(value, str) and _parsed(value) is value
        texts[name] = value if own else json.dumps(value, ensure_ascii=False)
    whole = {name: t.detach().to("cpu").contiguous() for name, t in tensors.items()}
    return safetensors.torch.save(whole, texts)


def read_notes(file: Path) -> dict[str, Any]:
    """Return the notes of a file that `pack` made; little of one that others made.

    Raises:
        ValueError: the file is truncated or corrupt.
    """
    try:
        with safetensors.safe_open(file, "pt") as opened:
            texts = opened.metadata() or {}
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file} is truncated or corrupt ({error}): copy it again") from None
    return {name: _parsed(text) for name, text in texts.items() if name != "format"}


def _parsed(text: str) -> Any:
    """Return what a text is as JSON, and itself where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def slug(text: str, length: int = 40) -> str:
    """Make a file name of a text.

    >>> slug("A red, red apple!")
    'a_red_red_apple'
    """
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")[:length] or "empty"


def numbers(value: Any) -> Any:
    """Turn tensors into lists, and what is not finite into None, for JSON."""
    if isinstance(value, Tensor):
        return numbers(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: numbers(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [numbers(v) for v in value]
    return value


def peak_memory() -> dict[str, float]:
    """Return the peak memory of this process so far, in MB, on each kind of device in use."""
    import resource

    peaks = {"cpu_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        peaks["cuda_mb"] = torch.cuda.max_memory_allocated() / 2**20
    return peaks
