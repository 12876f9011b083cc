"""The line on memory with which a run begins, where a device's memory is known."""

from collections.abc import Mapping
from typing import Any

import torch
from rich.console import Console

import steer

__all__ = ["memory_of", "say_memory"]


def memory_of(device: Any) -> tuple[int, int] | None:
    """Return free and whole memory of a device, in bytes; None where it is not known."""
    try:
        kind = torch.device("cpu" if device is None else device)
    except RuntimeError:  # no device: what loads the model says so
        return None
    if kind.type != "cuda" or not torch.cuda.is_available():
        return None
    return torch.cuda.mem_get_info(kind)


def say_memory(
    screen: Console,
    model: Any,
    reward: Any,
    device: Any,
    *,
    dtype: str | None = None,
    cfg: float | None = None,
    tuning: bool = False,
    model_options: Mapping[str, Any] | None = None,
    **planned: Any,
) -> None:
    """Say in a line what a run needs and what its device has; nothing where that is not known.

    What cannot be planned (a class of pipelines whose shapes are not known) is no reason not to
    run: then nothing is said.

    Args:
        screen: where it is said.
        model: as the command was given it; nothing of it is loaded.
        reward: likewise.
        device: of the run.
        dtype: of the weights.
        cfg: a scale of guidance that is mixed at run time.
        tuning: whether the run tunes.
        model_options: of a pipeline.
        **planned: more arguments of `steer.plan`.
    """
    memory = memory_of(device)
    if memory is None:
        return
    free, total = memory
    options = dict(model_options or {})
    if cfg is not None:
        options.setdefault("cfg", cfg)
    planned |= {"tuning": tuning, "dtype": None if dtype is None else getattr(torch, dtype)}

    def made(levers: bool) -> Any:
        return steer.plan(model, reward, levers=levers, **planned, **options)

    try:
        line = made(False).line(free, total)
        if "too little" in line:
            line = made(True).line(free, total)
    except (ValueError, TypeError, RuntimeError, NotImplementedError, AttributeError, OSError):
        return
    screen.print(line)
