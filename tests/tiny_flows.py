"""The tiny pipelines of `tests.tiny_pipelines` seen as flows, each made once a process.

They are shared: a test that changes a pipeline, or its weights, builds its own.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from steer.backends.pipeline import PipelineFlow
from steer.backends.table import flow_of
from tests import tiny_pipelines as tiny

__all__ = ["FAMILIES", "GUIDED", "PROMPT", "flow", "made", "pipe", "pipeline", "seen_as", "start"]

FAMILIES = tuple(name for name in tiny.NAMES if not name.startswith("generic"))
"""The families that the table names."""

GUIDED = tuple(name for name in FAMILIES if tiny.GUIDANCE[name])
"""Those with classifier-free guidance to switch on."""

CASES = [(name, on) for name in FAMILIES for on in (False, True) if name in GUIDED or not on]
"""Each family with guidance off, and on where it has some."""

PROMPT = "a red cube"


@cache
def pipe(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """Return a tiny pipeline with all its modules in a precision; do not change it."""
    return in_precision(tiny.build(name), dtype)


def in_precision(made: Any, dtype: torch.dtype) -> Any:
    """Put a pipeline's denoiser and autoencoder in a precision, and return it."""
    if dtype == torch.float32:
        return made
    made.to(dtype)
    return made


def seen_as(made: Any, name: str, *, on: bool = False, **options: Any) -> PipelineFlow:
    """Return a pipeline as a flow at its tiny size, guidance switched on or off."""
    call = dict(tiny.CALLS[name])
    size = {key: call.pop(key) for key in ("height", "width")}
    if tiny.GUIDANCE[name]:
        options.setdefault("cfg", tiny.GUIDANCE[name][2 if on else 1])
    return flow_of(made, **{**size, "call": call, **options})


@lru_cache(None)
def flow(
    name: str, *, on: bool = False, dtype: torch.dtype = torch.float32, **options: Any
) -> PipelineFlow:
    """Return a tiny pipeline as a flow, no prompt bound; do not change it."""
    return seen_as(pipe(name, dtype), name, on=on, **options)


@contextmanager
def switched(made: Any, name: str, on: bool) -> Iterator[dict[str, float]]:
    """Give the arguments that switch a pipeline's guidance; a guider is put back after."""
    own = getattr(made, "guider", None)
    try:
        yield tiny.guided(made, name, on=on)
    finally:
        if own is not None:
            made.update_components(guider=own)


def pipeline(name: str, *, on: bool = False, **run: Any) -> Tensor:
    """Return what the pipeline makes by itself: see `tiny_pipelines.run`."""
    with switched(pipe(name), name, on) as guidance:
        return tiny.run(pipe(name), name, **guidance, **run).float()


def source(seed: int = 0) -> torch.Generator:
    """Return a generator at its beginning."""
    return torch.Generator().manual_seed(seed)


def start(flow: PipelineFlow, seed: int = 0, prompt: str = PROMPT, steps: int = 2) -> Tensor:
    """Return the noise that the pipeline begins with, as a state (1, *event)."""
    call = flow.arguments_of_call(prompt, steps)
    with flow.prepared():
        first = flow.source.recorder(1, **call, generator=source(seed))[0]
    return flow.state_of(first)[:1].float()


def made(flow: PipelineFlow, x: Tensor, times: list[float], noise: Any = None) -> Tensor:
    """Return where jumps along these times lead; a student's re-noise with `noise`'s draws."""
    with torch.no_grad():
        for s, t in pairwise(times):
            if flow.churn == 0:
                x = flow.jump(x, s, t)
                continue
            data = flow.lookahead(x, s)
            again = torch.randn(x.shape, generator=noise) if t < 1 else 0.0
            x = t * data + (1 - t) * again
    return x
