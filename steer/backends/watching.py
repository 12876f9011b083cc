"""Observe a short run of a pipeline: the denoiser's arguments and results at each step."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from steer.backends.recording import Recorder

__all__ = ["PROMPT", "STEPS", "Found", "Watched", "names_of", "steps_of", "watch"]

PROMPT = "a picture of a house"
STEPS = 4


@dataclass(frozen=True)
class Watched:
    """The observations of one run.

    Attributes:
        calls: the denoiser's arguments by name and its results, in order.
        pictures: the pipeline's pictures, as tensors ("pt").
        scheduler: the scheduler of the run.
    """

    calls: list[tuple[dict[str, Any], Tensor]]
    pictures: Any
    scheduler: Any


@dataclass(frozen=True)
class Found:
    """One step: state and time of the denoiser, and its one or two predictions.

    Attributes:
        state: state of one row.
        time: time in the denoiser's convention.
        predictions: predictions for one row: two if guidance is mixed, in the pipeline's order.
    """

    state: Tensor
    time: float
    predictions: tuple[Tensor, ...]


def watch(pipe: Any, network: nn.Module, scheduler: Any, call: Mapping[str, Any]) -> Watched:
    """Run a pipeline for a few steps with a scheduler, and return the observations.

    Args:
        pipe: the pipeline; its own scheduler is restored.
        network: its denoiser.
        scheduler: scheduler of the run.
        call: further arguments of its call, besides prompt, steps and seed.

    Raises:
        ValueError: the pipeline cannot be called in this way; the message has its error.
    """
    forward, calls = network.forward, list[tuple[dict[str, Any], Tensor]]()
    known = inspect.signature(forward).parameters
    more = {"return_dict": False} if "return_dict" in known else {}

    def answer(found: dict[str, Any]) -> Any:
        made = forward(**found, **more)
        made = made[0] if isinstance(made, tuple) else getattr(made, "sample", made)
        if not isinstance(made, Tensor):
            raise TypeError(f"its denoiser returns a {type(made).__name__}, not a tensor")
        calls.append(({k: _copied(v) for k, v in found.items()}, made.clone()))
        return made

    asked = {"prompt": PROMPT, "num_inference_steps": STEPS, "output_type": "pt"}
    if "generator" in inspect.signature(type(pipe).__call__).parameters:
        asked["generator"] = torch.Generator().manual_seed(0)
    with _stepping_by(pipe, scheduler):
        try:
            made = Recorder(pipe, network, "").run(answer, **asked, **call)
        except Exception as error:
            raise ValueError(
                f"called with only a prompt it raises {type(error).__name__}: {error}"
            ) from error
    if len(calls) < STEPS:
        raise ValueError(f"in {STEPS} steps it calls its denoiser {len(calls)} times")
    return Watched(calls, made[0], scheduler)


@contextmanager
def _stepping_by(pipe: Any, scheduler: Any) -> Iterator[None]:
    own = pipe.scheduler
    pipe.scheduler = scheduler
    try:
        yield
    finally:
        pipe.scheduler = own


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def names_of(watched: Watched) -> tuple[str, str]:
    """Return the names of the denoiser's state and time, the arguments that change between calls.

    Args:
        watched: a run without guidance.

    Raises:
        ValueError: there is not exactly one of each, or another argument changes as well.
    """
    (first, out), (second, _) = watched.calls[:2]
    changed = [k for k, v in first.items() if not _same(v, second.get(k))]
    times = [k for k in changed if _number(first[k]) is not None]
    states = [
        k for k in changed
        if isinstance(first[k], Tensor) and first[k].ndim == out.ndim and k not in times
    ]  # fmt: skip
    if len(times) != 1 or len(states) != 1 or len(changed) != 2:
        raise ValueError(
            f"of its denoiser's arguments {', '.join(changed) or 'none'} change at each step, and "
            "a flow has only a state and a time"
        )
    return states[0], times[0]


def steps_of(watched: Watched, state: str, time: str) -> list[Found]:
    """Return the steps of a run; calls at the same time are combined."""
    steps: list[list[tuple[dict[str, Any], Tensor]]] = []
    for arguments, out in watched.calls:
        same = steps and _number(steps[-1][0][0][time]) == _number(arguments[time])
        if same:
            steps[-1].append((arguments, out))
        else:
            steps.append([(arguments, out)])
    found = []
    for calls in steps:
        x = calls[0][0][state]
        predictions = [p for _, out in calls for p in out.split(1)]
        now = _number(calls[0][0][time])
        assert now is not None
        # some also predict a variance, in as many further channels
        kept = tuple(p[:, : x.shape[1]] for p in predictions)
        if kept[0].shape != x[:1].shape:
            raise ValueError(
                f"its denoiser is given states of shape {tuple(x.shape[1:])} and predicts "
                f"{tuple(predictions[0].shape[1:])}: it takes more than a noisy picture, as "
                "inpainting models do"
            )
        found.append(Found(x[:1], now, kept))
    return found


def _number(value: Any) -> float | None:
    """Return a time as a number; None if it is not a number, or differs between rows."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return float(value)
    if isinstance(value, Tensor) and value.ndim <= 1 and value.numel():
        flat = value.flatten()
        return float(flat[0]) if bool((flat == flat[0]).all()) else None
    return None


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and bool((a == b).all())
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b) if not isinstance(a, Tensor) and not isinstance(b, Tensor) else False
