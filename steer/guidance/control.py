"""Controls: wrappers around a potential that change its gradient, never its value.

With `Ratio` weights the law that is sampled does not change: a control only changes the proposal,
theory (27).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from steer.flow import FlowMap
from steer.guidance.potential import Evaluation, Potential
from steer.path import Time, as_time, like
from steer.ranges import above, count, within

__all__ = [
    "Braked",
    "Clipped",
    "Normalised",
    "Window",
    "Windowed",
    "controlled",
    "direction",
    "row_norm",
]


class _Wrapper(Potential):
    """A potential with another gradient."""

    def __init__(self, potential: Potential) -> None:
        self.potential = potential
        self.temperature, self.prompts = potential.temperature, potential.prompts
        self.differentiable = potential.differentiable

    @property
    def asked(self) -> tuple[nn.Module, ...]:
        """The modules that the inner potential calls."""
        return self.potential.asked

    def predicts(self, flow: FlowMap, t: float) -> bool:
        """Return what the potential inside says."""
        return self.potential.predicts(flow, t)

    def evaluate(self, x: Tensor, t: Time, derivatives: bool = False) -> Evaluation:
        """Evaluate the inner potential, and change its gradient."""
        seen = self.potential.evaluate(x, t, derivatives)
        if seen.gradient is None:
            return seen
        # the rate of r_t itself, which is no longer `partial + b·gradient`
        return replace(seen, gradient=self._changed(seen.gradient, seen), partial=None)

    def _changed(self, gradient: Tensor, seen: Evaluation) -> Tensor:
        return gradient


def row_norm(x: Tensor) -> Tensor:
    """Return the norm of each row, at least in float32, never zero."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.to(dtype).flatten(1).norm(dim=1).clamp(min=1e-30)


def direction(x: Tensor) -> Tensor:
    """Divide each row by its norm, in the dtype of x; a zero row stays zero."""
    norm = row_norm(x)
    return (x.to(norm.dtype) / like(norm, x.to(norm.dtype))).to(x.dtype)


class Clipped(_Wrapper):
    """`∇r <- ∇r min(1, bound / |∇r|)`, per row.

    Args:
        potential: what is wrapped.
        bound: the largest norm, > 0, in the units of `∇r_t` (one over those of x).
    """

    def __init__(self, potential: Potential, bound: float) -> None:
        super().__init__(potential)
        self.bound = bound if bound == math.inf else above("bound", bound)

    def _changed(self, gradient: Tensor, seen: Evaluation) -> Tensor:
        return gradient * like((self.bound / row_norm(gradient)).clamp(max=1), gradient)


class Normalised(_Wrapper):
    """`∇r <- length ∇r / |∇r|`, per row; a zero gradient stays zero.

    Args:
        potential: what is wrapped.
        length: the norm of every row, > 0, in the units of `∇r_t`.
    """

    def __init__(self, potential: Potential, length: float) -> None:
        super().__init__(potential)
        self.length = above("length", length)

    def _changed(self, gradient: Tensor, seen: Evaluation) -> Tensor:
        return self.length * direction(gradient)


class Braked(_Wrapper):
    """No gradient for rows whose reward is at `reward` or above.

    A reward above that of real pictures is a sign of reward hacking: use their reward as the
    threshold.

    Args:
        potential: what is wrapped.
        reward: in the reward's own units.
    """

    def __init__(self, potential: Potential, reward: float) -> None:
        super().__init__(potential)
        if math.isnan(reward):
            raise ValueError("the reward of a brake must be a number, got nan")
        self.reward = reward

    def _changed(self, gradient: Tensor, seen: Evaluation) -> Tensor:
        return gradient * like((seen.reward < self.reward).to(gradient), gradient)


@dataclass(frozen=True)
class Window:
    """When a gradient is used: for `start <= t < stop`, at every `every`-th of these times.

    Raises:
        ValueError: a window outside [0, 1] or the wrong way round, or `every` below one.
    """

    start: float = 0.0
    stop: float = 1.0
    every: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop <= 1:
            raise ValueError(
                f"a guidance window from {self.start} to {self.stop}: give two times with "
                "0 <= start < stop <= 1 (0 noise, 1 data)"
            )
        count("every", self.every)

    @classmethod
    def of(cls, window: Sequence[float], every: int = 1) -> "Window":
        """Return the window for a pair of times.

        Raises:
            ValueError: it is no pair.
        """
        if len(window) != 2:
            raise ValueError(f"a guidance window is two times, start and stop; got {list(window)}")
        return cls(window[0], window[1], every)

    def holds(self, t: float) -> bool:
        """Return whether t is between start and stop."""
        return self.start - 1e-9 <= t < self.stop - 1e-9

    def times(self, of: Sequence[float]) -> list[float]:
        """Return those start times of a run's steps at which the gradient is used.

        Raises:
            ValueError: none of them.
        """
        begun = list(of[:-1])
        at = [t for t in begun if self.holds(t)][:: self.every]
        if not at:
            listed = ", ".join(f"{t:.3g}" for t in begun)
            raise ValueError(
                f"no step begins inside the guidance window from {self.start} to {self.stop}, so "
                f"no step would be guided: the steps begin at {listed}"
            )
        return at


class Windowed(_Wrapper):
    """A gradient only for `start <= t < stop`, and only at `times` if they are given.

    Elsewhere it is zero, and is not computed.

    Args:
        potential: what is wrapped.
        start: first time of the window.
        stop: end of the window.
        times: the times of the gradient, if it is used only every few steps.
    """

    def __init__(
        self,
        potential: Potential,
        start: float = 0.0,
        stop: float = 1.0,
        times: Sequence[float] | None = None,
    ) -> None:
        super().__init__(potential)
        for t in times or ():
            within("a guided time", t, 0.0, 1.0)
        self.window, self.times = Window(start, stop), times

    def open(self, t: float) -> bool:
        """Return whether the gradient is used at t."""
        listed = self.times is None or any(abs(t - s) < 1e-9 for s in self.times)
        return self.window.holds(t) and listed

    def evaluate(self, x: Tensor, t: Time, derivatives: bool = False) -> Evaluation:
        """Evaluate the inner potential, with its gradient only inside the window."""
        if not derivatives or self.open(float(as_time(t).max())):
            return self.potential.evaluate(x, t, derivatives)
        return replace(self.potential.evaluate(x, t), gradient=torch.zeros_like(x))


def controlled(
    potential: Potential,
    times: Sequence[float],
    *,
    window: Window | None = None,
    clip: float | None = None,
    normalise: float | None = None,
    brake: float | None = None,
) -> Potential:
    """Wrap a potential in the controls that are set; without any it is returned unchanged.

    Args:
        potential: the potential.
        times: of the run.
        window: when the gradient is used. Default: always.
        clip: see `Clipped`.
        normalise: see `Normalised`.
        brake: see `Braked`.
    """
    wrappers: list[tuple[Any, float | None]] = [
        (Normalised, normalise), (Clipped, clip), (Braked, brake),
    ]  # fmt: skip
    for wrapper, value in wrappers:
        if value is not None:
            potential = wrapper(potential, value)
    at = (window or Window()).times(times)
    if at != list(times[:-1]):
        potential = Windowed(potential, times=at)
    return potential
