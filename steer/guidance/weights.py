"""Weights: how much a step adds to a particle's log-weight."""

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from steer.flow import FlowMap
from steer.guidance.potential import Potential

__all__ = ["Continuous", "Ratio", "Step", "Weights"]


@dataclass
class Step:
    """One step of all particles, from (x, s) to (x_next, t).

    Attributes:
        log_ratio: `log p(x_next | x) - log q(x_next | x)`, (n,).
        first: whether r at the start counts as 0.
    """

    x: Tensor
    s: float
    x_next: Tensor
    t: float
    log_ratio: Tensor
    potential: Potential
    flow: FlowMap
    first: bool

    @cached_property
    def r_s(self) -> Tensor:
        """`r_s(x)`, and 0 at the first time."""
        return self.log_ratio * 0 if self.first else self.potential(self.x, self.s)

    @cached_property
    def r_t(self) -> Tensor:
        """`r_t(x_next)`."""
        return self.potential(self.x_next, self.t)

    def rate(self) -> Tensor:
        """`(∂_t + b·∇) r` at the start of the step."""
        seen = self.potential.evaluate(self.x, self.s, derivatives=True)
        b = self.x if seen.total is not None else self.flow.velocity(self.x, self.s)
        return seen.rate(b)


class Weights:
    """A rule for the increments."""

    def __call__(self, step: Step) -> Tensor:
        """Return the increment of log_w, (n,)."""
        raise NotImplementedError("abstract")


class Ratio(Weights):
    """`log_w += r_t(x') - r_s(x) + log p(x'|x) - log q(x'|x)`: exact for every proposal q.

    Unbiased for the chain of the unguided kernel p at any step size, theory (23, 24) (Del Moral,
    Doucet, Jasra 2006, sequential Monte Carlo samplers).
    """

    def __call__(self, step: Step) -> Tensor:
        """Return the increment of log_w, (n,)."""
        return step.r_t - step.r_s + step.log_ratio


class Continuous(Weights):
    """`log_w += (t - s) (∂_t r + b·∇r)(x, s)`: the published dA over the step, biased O(t - s).

    Valid where the drift is shifted by exactly `eps ∇r`, theory (21, 29) (Sabour et al. 2025,
    2511.22688). The first step adds `r(x, times[0])`, where the ramp is not 0 at the start.
    """

    def __call__(self, step: Step) -> Tensor:
        """Return the increment of log_w, (n,)."""
        start = step.potential(step.x, step.s) if step.first else 0  # r at the start counts as 0
        return start + (step.t - step.s) * step.rate()
