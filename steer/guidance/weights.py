"""Weights: how much a step adds to a particle's log-weight."""

from dataclasses import dataclass

from torch import Tensor

from steer.guidance.state import State

__all__ = ["Continuous", "Ratio", "Step", "Unweighted", "Weights"]


@dataclass(frozen=True)
class Step:
    """One step of all particles, from `here` to `there`.

    Attributes:
        here: the state at the start.
        there: the state that was proposed.
        log_ratio: `log p(there | here) - log q(there | here)`, (n,).
        first: whether r at the start counts as 0.
    """

    here: State
    there: State
    log_ratio: Tensor
    first: bool = False

    @property
    def r_s(self) -> Tensor:
        """`r_s(x)`, and 0 at the first time."""
        return self.log_ratio * 0 if self.first else self.here.value

    @property
    def r_t(self) -> Tensor:
        """`r_t(x')`."""
        return self.there.value

    def rate(self) -> Tensor:
        """`(∂_t + b·∇) r` at the start of the step."""
        seen = self.here.evaluation(derivatives=True)
        return seen.rate(self.here.x if seen.total is not None else self.here.velocity)


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


class Unweighted(Weights):
    """`log_w` stays 0: for what is drawn without a reward."""

    def __call__(self, step: Step) -> Tensor:
        """Return zeros, (n,)."""
        return step.log_ratio * 0


class Continuous(Weights):
    """`log_w += (t - s) (∂_t r + b·∇r)(x, s)`: the published dA over the step, biased O(t - s).

    Valid where the drift is shifted by exactly `eps ∇r`, theory (21, 29) (Sabour et al. 2025,
    2511.22688). The first step adds `r(x, times[0])`, where the ramp is not 0 at the start.
    """

    def __call__(self, step: Step) -> Tensor:
        """Return the increment of log_w, (n,)."""
        start = step.here.value if step.first else 0  # r at the start counts as 0
        return start + (step.there.t - step.here.t) * step.rate()
