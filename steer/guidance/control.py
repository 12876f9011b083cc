"""Controls: wrappers around a potential that change what its gradient does, never its value.

With `Ratio` weights the law that is sampled stays as it is: a control only shapes the proposal,
theory (27).
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from steer.guidance.potential import Evaluation, Potential
from steer.path import Time, as_time, like
from steer.ranges import above, count, within

__all__ = ["Braked", "Clipped", "Normalised", "Windowed", "controlled"]


class _Wrapper(Potential):
    """A potential with another gradient."""

    def __init__(self, potential: Potential) -> None:
        self.potential = potential
        self.temperature, self.prompts = potential.temperature, potential.prompts
        self.differentiable = potential.differentiable

    def evaluate(self, x: Tensor, t: Time, derivatives: bool = False) -> Evaluation:
        """Evaluate the potential inside, and change its gradient."""
        seen = self.potential.evaluate(x, t, derivatives)
        if seen.gradient is None:
            return seen
        # the rate is that of r_t itself: no longer `partial + b·gradient`
        return replace(seen, gradient=self._changed(seen.gradient, seen), partial=None)

    def _changed(self, gradient: Tensor, seen: Evaluation) -> Tensor:
        return gradient


def row_norm(x: Tensor) -> Tensor:
    """Return the norm of each row, at least in float32, never zero."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.to(dtype).flatten(1).norm(dim=1).clamp(min=1e-30)


def direction(x: Tensor) -> Tensor:
    """Return each row over its norm, in the dtype of x; a zero row stays zero."""
    norm = row_norm(x)
    return (x.to(norm.dtype) / like(norm, x.to(norm.dtype))).to(x.dtype)


class Clipped(_Wrapper):
    """`∇r <- ∇r min(1, bound / |∇r|)`, each row by itself.

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
    """`∇r <- length ∇r / |∇r|`, each row by itself; a zero gradient stays zero.

    Args:
        potential: what is wrapped.
        length: the norm that every row gets, > 0, in the units of `∇r_t`.
    """

    def __init__(self, potential: Potential, length: float) -> None:
        super().__init__(potential)
        self.length = above("length", length)

    def _changed(self, gradient: Tensor, seen: Evaluation) -> Tensor:
        return self.length * direction(gradient)


class Braked(_Wrapper):
    """No gradient for the rows whose reward is seen at `reward` or above.

    A reward that is pushed beyond what real pictures have is being hacked: give it that height.

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


class Windowed(_Wrapper):
    """A gradient for `start <= t < stop` alone, and where `times` are given, at those alone.

    Elsewhere it is zero, and is not computed.

    Args:
        potential: what is wrapped.
        start: from when on.
        stop: until when.
        times: for a gradient every few steps.
    """

    def __init__(
        self,
        potential: Potential,
        start: float = 0.0,
        stop: float = 1.0,
        times: Sequence[float] | None = None,
    ) -> None:
        super().__init__(potential)
        if not 0 <= start < stop <= 1:
            raise ValueError(
                f"a guidance window from {start} to {stop}: give two times with "
                "0 <= start < stop <= 1 (0 noise, 1 data)"
            )
        for t in times or ():
            within("a guided time", t, 0.0, 1.0)
        self.start, self.stop, self.times = start, stop, times

    def open(self, t: float) -> bool:
        """Return whether there is a gradient at t."""
        inside = self.start - 1e-9 <= t < self.stop - 1e-9
        return inside and (self.times is None or any(abs(t - s) < 1e-9 for s in self.times))

    def evaluate(self, x: Tensor, t: Time, derivatives: bool = False) -> Evaluation:
        """Evaluate the potential inside, with its gradient inside the window only."""
        if not derivatives or self.open(float(as_time(t).max())):
            return self.potential.evaluate(x, t, derivatives)
        return replace(self.potential.evaluate(x, t), gradient=torch.zeros_like(x))


def guided_times(
    times: Sequence[float], window: Sequence[float] = (0.0, 1.0), every: int = 1
) -> list[float]:
    """Return the times of a run's steps at which the gradient counts.

    Args:
        times: of the run.
        window: (start, stop): `start <= t < stop`.
        every: of those, each `every`-th, beginning with the first.

    Raises:
        ValueError: a window outside [0, 1] or the wrong way round, or `every` below one.
    """
    count("every", every)
    if len(window) != 2:
        raise ValueError(f"a guidance window is two times, start and stop; got {list(window)}")
    gate = Windowed(_NOTHING, window[0], window[1])
    return [t for t in times[:-1] if gate.open(t)][::every]


class _Nothing(Potential):
    def evaluate(self, x: Tensor, t: Time, derivatives: bool = False) -> Evaluation:
        raise NotImplementedError


_NOTHING = _Nothing()


def controlled(
    potential: Potential,
    times: Sequence[float],
    *,
    window: Sequence[float] = (0.0, 1.0),
    every: int = 1,
    clip: float | None = None,
    normalise: float | None = None,
    brake: float | None = None,
) -> Potential:
    """Wrap a potential in the controls that are set; without any it is returned as it is.

    Args:
        potential: the potential.
        times: of the run.
        window: see `guided_times`.
        every: see `guided_times`.
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
    at = some_guided(times, window, every)
    if at != list(times[:-1]):
        potential = Windowed(potential, times=at)
    return potential


def some_guided(times: Sequence[float], window: Sequence[float], every: int) -> list[float]:
    """Return `guided_times`, of which there must be one.

    Raises:
        ValueError: no step begins inside the window.
    """
    at = guided_times(times, window, every)
    if not at:
        begun = ", ".join(f"{t:.3g}" for t in times[:-1])
        raise ValueError(
            f"no step begins inside the guidance window from {window[0]} to {window[1]}, so "
            f"nothing would be guided: the steps begin at {begun}"
        )
    return at
