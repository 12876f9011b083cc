"""A short run of a pipeline, watched: what its denoiser is given and returns at each step."""

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
    """What was seen of one run.

    Attributes:
        calls: the denoiser's arguments by name and what it returned, in order.
        pictures: what the pipeline made of it, as it gives "pt".
        scheduler: the one that the run was made with.
    """

    calls: list[tuple[dict[str, Any], Tensor]]
    pictures: Any
    scheduler: Any


@dataclass(frozen=True)
class Found:
    """One step: state and time of the denoiser, and its predictions, one or two of a kind.

    Attributes:
        state: for one row.
        time: as the denoiser gets it.
        predictions: for one row each: two where guidance is mixed, in the pipeline's order.
    """

    state: Tensor
    time: float
    predictions: tuple[Tensor, ...]


def watch(pipe: Any, network: nn.Module, scheduler: Any, call: Mapping[str, Any]) -> Watched:
    """Run a pipeline for a few steps by a scheduler, and return what was seen.

    Args:
        pipe: the pipeline; its own scheduler is put back.
        network: its denoiser.
        scheduler: what it steps by.
        call: what it is called with, beside the prompt, the steps and the seed.

    Raises:
        ValueError: the pipeline cannot be called so; says what it said.
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
    """Return the names of the denoiser's state and time: what changes from call to call.

    Args:
        watched: a run without guidance.

    Raises:
        ValueError: there is not one of each, or something else changes as well.
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
    """Return the steps of a run, calls at one time put together."""
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
        # some predict a variance beside, in as many channels again
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
    """Return a time as a number; None where it is none, or differs among rows."""
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
