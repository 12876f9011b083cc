"""`Figure`: a published number and ours, and how samples are drawn for it."""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Generator, Tensor

import steer
from steer.guidance.posterior import PosteriorValue
from steer.guidance.tfg import TrainingFree
from steer.path import Time, step_times
from steer.reward import Reward
from steer.sampling.methods import TABLE

__all__ = [
    "Draw",
    "Figure",
    "assigned",
    "deviation",
    "drawn",
    "mean",
    "plugged_in",
    "seeded",
]

Draw = Callable[[Tensor, Time, int, Generator], Tensor]
"""`GaussianMixture.posterior_sample`, or `Glass.sample`."""


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


def deviation(
    what: str, wanted: float | None, values: Tensor, source: str = "closed form"
) -> Figure:
    """Return the figure of a standard deviation of independent values (n,), as of normal ones."""
    ours = float(values.double().std())
    return Figure(what, wanted, ours, ours / math.sqrt(2 * len(values)), source)


def assigned(x: Tensor, y: Tensor, power: int = 1) -> float:
    """Return the mean of `|x_i - y_j|^power` over the optimal assignment of n points to n."""
    from scipy.optimize import linear_sum_assignment

    cost = torch.cdist(x.double(), y.double()).pow(power).numpy()
    return float(cost[linear_sum_assignment(cost)].mean())


def seeded(seed: int) -> Generator:
    """Return a generator."""
    return torch.Generator().manual_seed(seed)


def drawn(
    method: str,
    flow: steer.GaussianMixture,
    reward: Reward,
    temperature: float,
    steps: int,
    n: int,
    seed: int = 0,
    **options: Any,
) -> Tensor:
    """Return n samples (n, d) by a method of the table, without weights."""
    x = torch.randn(n, *flow.event_shape, generator=seeded(seed))
    sampler = TABLE[method].build(flow, reward, None, temperature, step_times(steps), **options)
    *_, end = sampler.steps(x, seed)
    return end.x


class Fresh:
    """Posterior samples with normals of their own for each row, as the publications have them.

    `PosteriorValue` gives all rows the same ones, so that its value is a function of the state.
    """

    def __init__(self, draw: Draw, seed: int) -> None:
        self.draw, self.generator = draw, seeded(seed)

    def sample(self, x: Tensor, t: Time, n: int, *, noise: Tensor | None = None) -> Tensor:
        """Return (n, *x.shape); `noise` is not used."""
        return self.draw(x, t, n, self.generator)


def plugged_in(
    draw: Draw,
    draws: int,
    gradient: Literal["covariance", "through"],
    flow: steer.GaussianMixture,
    reward: Reward,
    temperature: float,
    steps: int,
    n: int,
    seed: int = 0,
    **options: Any,
) -> Tensor:
    """Return n samples (n, d) by the ODE `b + c_t ∇V`, V estimated by posterior samples.

    `gradient` is that of `PosteriorValue`: of the reward, or none of it.
    """
    x = torch.randn(n, *flow.event_shape, generator=seeded(seed))
    source = Fresh(draw, seed)
    value = PosteriorValue(flow, reward, None, temperature, source, draws, gradient)
    *_, end = TrainingFree(flow, value, step_times(steps), **options).steps(x, seed)
    return end.x
