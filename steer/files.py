"""Files and run folders: written atomically, never over files of other programs."""

import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from steer.lock import holder, lock_of, locked

__all__ = [
    "RUNS",
    "expanded",
    "numbers",
    "pack",
    "peak_memory",
    "read_notes",
    "refuse_existing",
    "slug",
    "sync_folder",
    "tidy",
    "whole_folder",
    "write_atomically",
]

_ADAPTERS = ("adapter_config.json", "adapter_model.safetensors")
_SHARED = "pytorch_lora_weights.safetensors"
_CARD = ("README.md", "grid.png", "samples.png", "front.png", "front_*.png", "front*.svg")
_LOGS = ("log/*", "tensorboard/*", "wandb/*")

RUNS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "samples": (
        ("metrics.json", "scores.jsonl", "grid.png"),
        ("config.yaml", "command.txt", "images/[0-9]*.png", "film.gif", "film.mp4",
         "filmstrip.png"),
    ),
    "a comparison": (
        ("config.yaml", "table.md", "figures.json"),
        ("pictures.safetensors", "samples.safetensors", "tuning.json", "sheet.png",
         "reward_nfe*.png", "reward_nfe*.svg",
         "reward_diversity*.png", "reward_diversity*.svg", "judge_reward*.png",
         "judge_reward*.svg"),
    ),
    "an evaluation": (
        ("config.yaml", "table.md", "metrics.json"), ("front.png", "front.svg", "sheet.png"),
    ),
    "a tuning run": (
        ("run.json",),
        (*_ADAPTERS, _SHARED, *_CARD, *_LOGS, "finished.json", "readings.jsonl", "front.json",
         "best/adapter_*", f"best/{_SHARED}", "best/README.md", "sheets/[0-9]*.png",
         "checkpoints/*.ckpt"),
    ),
    "adapters": (
        _ADAPTERS, (_SHARED, *_CARD, "best/adapter_*", f"best/{_SHARED}", "best/README.md"),
    ),
    "adapters for diffusers": ((_SHARED,), _CARD),
    "adapters for ComfyUI": (("lora.safetensors",), _CARD),
    "a model": (("config.json", "model.safetensors"), _CARD),
    "a training run": (
        ("settings.json",),
        tuple(f"{stage}/{name}" for stage in ("velocity", "map") for name in
              ("*.ckpt", "*.json", "*.safetensors", "sheets/[0-9]*.png", *_LOGS)),
    ),
}  # fmt: skip
"""Kind of run -> the files that identify it, all required, and other files that it may have."""

_SCRATCH = ".*.[0-9]*.tmp"
_ANYWHERE = (_SCRATCH, ".DS_Store", ".lock")
"""Hidden files that may be deleted: unfinished files of killed runs, and files of desktops."""


def expanded(path: str | os.PathLike[str]) -> Path:
    """Expand `~` in a path: the only place where this is done.

    Raises:
        ValueError: `~USER` with a user who does not exist on this machine.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ValueError(
            f"{os.fspath(path)}: there is no user of that name on this machine"
        ) from None


@contextmanager
def whole_folder(folder: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder that becomes `folder` if the block succeeds, and else is deleted.

    Its content is synced to disk before it is renamed.

    A replaced folder is deleted only when the new one is in place, and kept if that fails.
    Leftovers of a killed process are cleaned up first.

    Raises:
        FileExistsError: the folder exists, and `overwrite` is not set or no run of this package
            wrote it.
        BlockingIOError: another process writes to it.
    """
    refuse_existing(folder, overwrite)
    place = expanded(folder).resolve()
    scratch, old = (place.with_name(f".{place.name}.{what}") for what in ("new", "old"))
    with locked(folder, lock_of(place)):
        _recover(place, old)
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        try:
            yield scratch
            _sync(scratch)
            refuse_existing(folder, overwrite, held=True)  # it may be new
            if place.exists():
                os.replace(place, old)
            try:
                os.replace(scratch, place)
            finally:
                _recover(place, old)
            sync_folder(place.parent)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Sync the content of a folder to disk, so that it survives a power cut after the rename."""
    for path in folder.rglob("*"):
        if path.is_dir():
            sync_folder(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())
    sync_folder(folder)


def _recover(place: Path, old: Path) -> None:
    """Restore an old folder whose replacement was never finished, else delete it."""
    if old.exists() and not place.exists():
        os.replace(old, place)
    shutil.rmtree(old, ignore_errors=True)


def refuse_existing(folder: Path, overwrite: bool, *, held: bool = False) -> None:
    """Raise an error if something would be overwritten without `overwrite`, or is not a run.

    This is the only place where that is decided. An empty folder may be replaced.

    Args:
        folder: where something is to be written.
        overwrite: whether a run of ours in it may be replaced.
        held: whether this process itself holds the lock of the folder.

    Raises:
        FileExistsError: there is something that must not be replaced; the message names it.
        BlockingIOError: another process is writing to the folder.
    """
    place = expanded(folder)
    who = None if held else holder(lock_of(place))
    if who is not None:
        raise BlockingIOError(
            f"another process is writing to {folder} ({who}): wait until it is done, end it, or "
            "give another folder"
        )
    if not place.exists():
        return
    if not overwrite:
        raise FileExistsError(
            f"{folder} exists already and is not changed: choose another folder, or set overwrite "
            "(--overwrite on the command line)"
        )
    found = _strange(place)
    if found:
        raise FileExistsError(
            f"{folder} is not changed, although overwrite was set: {found}; choose another "
            "folder, or move that away yourself"
        )


def _strange(place: Path) -> str:
    """Return what prevents a folder from being replaced; "" if it holds only a run of ours."""
    if not place.is_dir():
        return "it is not a folder"
    whole = place.resolve()
    if Path.cwd().is_relative_to(whole):
        return "it is the current folder, or contains it"
    if Path.home().resolve().is_relative_to(whole):
        return "it is your home folder, or contains it"
    names = list(islice(_named(whole.iterdir()), 5))
    if not names:
        return ""
    kinds = [
        kind for kind, (marks, _) in RUNS.items() if all((whole / m).is_file() for m in marks)
    ]
    if not kinds:
        return f"it contains no run of flowsteer, but {_few(names)}"
    known = {name for kind in kinds for part in RUNS[kind] for name in part}
    others = (
        path.relative_to(whole).as_posix()
        for path in _leaves(whole)
        if not any(fnmatchcase(path.relative_to(whole).as_posix(), name) for name in known)
        and not any(fnmatchcase(path.name, name) for name in _ANYWHERE)
    )
    found = list(islice(others, 5))
    return f"beside {kinds[0]} it contains {_few(found)}, which no run of flowsteer wrote" * bool(
        found
    )


def _named(paths: Iterator[Path]) -> Iterator[str]:
    return (p.name for p in paths if not any(fnmatchcase(p.name, name) for name in _ANYWHERE))


def _few(names: list[str]) -> str:
    return ", ".join([*names[:4], *(["..."] if len(names) > 4 else [])])


def _leaves(folder: Path) -> Iterator[Path]:
    """Yield the files in a folder, at any depth; links are yielded, not followed."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            yield from _leaves(path)
        else:
            yield path


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file atomically, even if the process is killed."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with scratch.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
    sync_folder(path.parent)


def tidy(folder: Path) -> None:
    """Remove files of interrupted writes from a folder; no other process may be writing to it."""
    for file in folder.rglob(_SCRATCH):
        file.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Sync a folder's entries to disk, where the system supports it."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        with suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def pack(tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> bytes:
    """Return a safetensors file: tensors, and notes (JSON values) that `read_notes` reads."""
    texts = {"format": "pt"}
    for name, value in notes.items():
        own = isinstance(value, str) and _parsed(value) is value
        texts[name] = value if own else json.dumps(value, ensure_ascii=False)
    whole: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        t = tensor.detach().to("cpu").contiguous()
        storage = t.untyped_storage().data_ptr()
        whole[name] = t.clone() if storage in seen else t  # safetensors refuses shared memory
        seen.add(storage)
    return safetensors.torch.save(whole, texts)


def read_notes(file: Path) -> dict[str, Any]:
    """Return the notes of a file that `pack` made; other files have few or none.

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
    """Parse a text as JSON; return the text itself if it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def slug(text: str, length: int = 40) -> str:
    """Make a file name from a text.

    >>> slug("A red, red apple!")
    'a_red_red_apple'
    """
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")[:length] or "empty"


def numbers(value: Any) -> Any:
    """Turn tensors into lists, and numbers that are not finite into None, for JSON."""
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
