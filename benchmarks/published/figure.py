"""`Figure`: a published number beside ours."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

import steer
from steer.path import step_times
from steer.reward import Reward
from steer.sampling.methods import TABLE

__all__ = ["Figure", "drawn", "mean"]


class Figure(NamedTuple):
    """A number that a publication, or a closed form, has, and ours.

    Attributes:
        what: what it is of.
        wanted: the number; None where none is public.
        ours: what was found.
        error: its standard error; None where it has none, as of quadrature.
        source: "published", "closed form", or what else `wanted` is.
    """

    what: str
    wanted: float | None
    ours: float
    error: float | None = None
    source: str = "published"


def mean(what: str, wanted: float | None, values: Tensor, source: str = "published") -> Figure:
    """Return the figure of a mean of independent values (n,)."""
    error = float(values.double().std()) / math.sqrt(len(values))
    return Figure(what, wanted, float(values.double().mean()), error, source)


def drawn(
    method: str,
    flow: steer.GaussianMixture,
    reward: Reward,
    temperature: float,
    steps: int,
    n: int,
    seed: int = 0,
    **options: object,
) -> Tensor:
    """Return n draws (n, d) of a method of the table, without weights."""
    x = torch.randn(n, *flow.event_shape, generator=torch.Generator().manual_seed(seed))
    build = TABLE[method].build
    sampler = build(flow, reward, None, temperature, step_times(steps), **options)
    *_, end = sampler.steps(x, seed)
    return end.x
