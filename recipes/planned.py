"""The line on memory at the start of a run, if the device's memory is known."""

from collections.abc import Mapping
from typing import Any

import torch
from rich.console import Console

import steer

__all__ = ["memory_of", "say_memory"]


def memory_of(device: Any) -> tuple[int, int] | None:
    """Return free and total memory of a device, in bytes; None if unknown."""
    try:
        kind = torch.device("cpu" if device is None else device)
    except RuntimeError:  # no such device: the loading of the model reports it
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
    """Print one line on the memory that a run needs and that its device has; nothing if unknown.

    A model that cannot be planned (a class of pipelines whose shapes are not known) can still be
    run: then nothing is printed.

    Args:
        screen: console for the line.
        model: the model as given to the command; it is not loaded.
        reward: the reward as given to the command.
        device: device of the run.
        dtype: of the weights.
        cfg: scale of classifier-free guidance that is mixed at run time.
        tuning: whether it is a tuning run.
        model_options: options of a pipeline.
        **planned: further arguments of `steer.plan`.
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
