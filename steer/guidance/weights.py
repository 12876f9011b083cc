"""Weights: the increment of a particle's log-weight in a step."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from steer.guidance.state import State
from steer.names import unknown

__all__ = ["KINDS", "Continuous", "FeynmanKac", "Ratio", "Step", "Unweighted", "Weights"]


KINDS = ("difference", "max", "sum")
"""The potentials of FK steering."""


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

    def rows(self, index: Tensor) -> None:
        """Reorder internal state to the new rows, (n,), given by their previous indices."""


class Ratio(Weights):
    """`log_w += r_t(x') - r_s(x) + log p(x'|x) - log q(x'|x)`: exact for every proposal q.

    Unbiased for the chain of the unguided kernel p at any step size, theory (23, 24) (Del Moral,
    Doucet, Jasra 2006, sequential Monte Carlo samplers).
    """

    def __call__(self, step: Step) -> Tensor:
        """Return the increment of log_w, (n,)."""
        return step.r_t - step.r_s + step.log_ratio


class FeynmanKac(Weights):
    """FK steering's potentials: they depend on all rewards of a path so far.

    With R_k the reward over its temperature seen at step k, without a ramp, `log G_k` is

        "difference": R_k - R_{k-1}      "max": max_{j<=k} R_j      "sum": Σ_{j<=k} R_j

    and at the end `R - Σ_{j<k} log G_j`, so that a complete path has the weight `exp(R)`: each of
    the three samples the tilt of the kernel's own law, exactly in the limit of many particles
    (Singhal et al. 2025, 2501.06848). Use a potential without a ramp, and a kernel that is not
    shifted.

    "max" and "sum" count a reward in every step. During the run they select more strongly than the
    tilt, and the last weights correct this. If the tilt is strong, the corrected weights are on a
    few particles: at a temperature at which plain importance sampling has an ESS of 7 %,
    "difference" has 59 % after ten steps, "max" and "sum" have 1 to 2 %, and log Z is not
    reliable. Then they are searches.

    Args:
        kind: "difference", "max" or "sum".

    Raises:
        ValueError: another kind.
    """

    def __init__(self, kind: Literal["difference", "max", "sum"] = "max") -> None:
        if kind not in KINDS:
            raise unknown("kind", kind, KINDS)
        self.kind = kind
        self._total: Tensor | None = None
        self._seen: Tensor | None = None

    def __call__(self, step: Step) -> Tensor:
        """Return the increment of log_w, (n,)."""
        r = step.r_t
        if self._total is None or step.first:
            self._total, self._seen = torch.zeros_like(r), None
        before = self._seen
        if self.kind == "max":
            now = r if before is None else torch.maximum(r, before)
        elif self.kind == "sum":
            now = r if before is None else r + before
        else:
            now = r
        if step.there.t == 1:
            return r - self._total + step.log_ratio
        increment = now if self.kind != "difference" or before is None else now - before
        self._seen, self._total = now, self._total + increment
        return increment + step.log_ratio

    def rows(self, index: Tensor) -> None:
        """Reorder the recorded rewards with the rows."""
        if self._total is not None and self._seen is not None:
            self._total, self._seen = self._total[index], self._seen[index]


class Unweighted(Weights):
    """`log_w` stays 0: for unguided samples."""

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
