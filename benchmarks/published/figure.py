"""`Figure`: a published number and ours."""

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
    """A number from a publication or a closed form, and ours.

    Attributes:
        what: description of the number.
        wanted: the number; None if it is not public.
        ours: our number.
        error: its standard error; None if it has none, for example by quadrature.
        source: source of `wanted`: "published", "closed form" or another one.
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
    """Return n samples (n, d) by a method of the table, without weights."""
    x = torch.randn(n, *flow.event_shape, generator=torch.Generator().manual_seed(seed))
    build = TABLE[method].build
    sampler = build(flow, reward, None, temperature, step_times(steps), **options)
    *_, end = sampler.steps(x, seed)
    return end.x
