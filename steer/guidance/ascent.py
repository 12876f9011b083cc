"""Ascent of the reward itself: samplers that follow its gradient, without weights.

They seek high rewards near the model's own samples; the law that they sample is not the
exponential tilt, and they have no log Z. What keeps their pictures believable is the model (every
picture is one of its outputs) and the brakes: a small step, a window, a height at which to stop.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from steer.flow import FlowMap
from steer.guidance.control import direction, row_norm
from steer.guidance.population import Population, Stop, check_times, lead_shape, not_finite
from steer.guidance.potential import Lookahead, Potential
from steer.guidance.state import SharedFlow, SharedPotential
from steer.path import like
from steer.reward import Reward

__all__ = ["FlowMapControl", "NoiseAscent", "Sampler", "whole_reward"]


class Sampler(Protocol):
    """What `steer.sample` runs: `Guidance` and the samplers of this module."""

    batch_size: int | None

    def steps(
        self, x0: Tensor, seed: int = 0, *, position: int = 0, stop: Stop | None = None
    ) -> Iterator[Population]:
        """Yield the population after each step."""


def whole_reward(
    flow: FlowMap, reward: Reward, prompts: Sequence[str] | None, steps: int = 1
) -> Potential:
    """Return the reward of the lookahead, neither ramped nor divided: `reward(X(t,1,x))`."""
    return Lookahead(flow, reward, prompts, 1.0, steps, ramp=torch.ones_like)


class _Ascent:
    """What both samplers share: rows, micro-batches, checks, and what the caller sees."""

    def __init__(
        self,
        potential: Potential,
        flow: FlowMap,
        batch_size: int | None = None,
    ) -> None:
        self.potential, self.flow, self.batch_size = potential, flow, batch_size

    def _begin(self, x0: Tensor, position: int) -> None:
        self.lead = lead_shape(x0, self.flow.event_shape)
        self.p, self.n = (1, self.lead[0]) if len(self.lead) == 1 else self.lead
        self.position, self.k, self.count = position, 0, 1
        self.shared = SharedFlow(self.flow, self.p, self.batch_size)

        def check(what: str, values: Tensor) -> None:
            prompts = self.potential.prompts
            where = f"step {self.k + 1} of {self.count}"
            not_finite(what, values, self.n, position, prompts, where)

        self.seen = SharedPotential(
            self.potential, self.p, self.batch_size, derivatives=False, check=check
        )

    def _population(self, x: Tensor, time: float, reward: Tensor) -> Population:
        """Return the population: no weights, so they are zero."""
        shaped = reward.reshape(self.lead)
        zero = torch.zeros_like(shaped)
        size = torch.full(self.lead[:-1], float(self.n), device=x.device)
        x = x.reshape(*self.lead, *x.shape[1:])
        return Population(x, time, zero, zero.sum(-1), shaped, size)


class FlowMapControl(_Ascent):
    """FMRG-J: the map's own steps, each with a push up the reward of the lookahead.

    `x <- X(s,t,x) + (t - s) scale |u| g / |g|`, theory (47), with the unguided mean velocity
    `u = (X(s,t,x) - x) / (t - s)` and `g = ∇ reward(X(s,1,x))`: deterministic optimal control,
    theory (46) (2604.27147), with its gradient normalised to the velocity's norm. It tilts by
    transport cost, not exponentially, and over-concentrates inside a mode (2606.02884): keep the
    scale small.

    Args:
        flow: the flow map, prompts already bound.
        potential: the reward as seen from t, with its controls; `whole_reward` makes one.
        times: increasing, in [0, 1].
        scale: the push as a multiple of the velocity.
        guided: the times at which to push. Default: at the start of every step.
        batch_size: the most rows in one network call; None: all at once.

    Raises:
        ValueError: times that do not increase within [0, 1], a time of `guided` that is none of
            them, or a negative scale.
    """

    def __init__(
        self,
        flow: FlowMap,
        potential: Potential,
        times: Sequence[float],
        scale: float = 0.3,
        guided: Sequence[float] | None = None,
        batch_size: int | None = None,
    ) -> None:
        super().__init__(potential, flow, batch_size)
        check_times(times)
        if not scale >= 0:
            raise ValueError(f"scale must not be negative, got {scale}: it would lead downwards")
        self.times, self.scale = list(times), scale
        begun = self.times[:-1]
        wanted = begun if guided is None else guided
        self.guided = [s for s in begun if any(abs(s - t) < 1e-9 for t in wanted)]
        if len(self.guided) < len(wanted):
            raise ValueError(f"cannot push at {list(wanted)}: the steps begin at {begun}")

    def steps(
        self, x0: Tensor, seed: int = 0, *, position: int = 0, stop: Stop | None = None
    ) -> Iterator[Population]:
        """Yield the population after each step; nothing is random, the seed is not used.

        The population's reward is seen from where the next step pushes, and at t = 1; elsewhere
        it is NaN. Where `stop` says so, one jump to t = 1 ends the run.
        """
        yield from copy.copy(self)._steps(x0, position, stop)  # a run's state is its own

    def _steps(self, x0: Tensor, position: int, stop: Stop | None) -> Iterator[Population]:
        self._begin(x0, position)
        self.count = len(self.times) - 1
        x = x0.detach().reshape(self.p * self.n, *self.flow.event_shape)
        for k, (s, t) in enumerate(zip(self.times, self.times[1:], strict=False)):
            with torch.no_grad():
                self.k = k
                x = self._step(x, s, t)
                population = self._population(x, t, self._reward(x, t))
            yield population
            if t < 1 and stop is not None and stop(population):
                with torch.no_grad():
                    x = self.shared.jump(x, t, 1.0)
                    population = self._population(x, 1.0, self.seen.evaluate(x, 1.0).reward)
                yield population
                return

    def _step(self, x: Tensor, s: float, t: float) -> Tensor:
        y = self.shared.jump(x, s, t)
        if s not in self.guided:
            return y
        push = direction(self.seen.gradient(x, s)[1])
        return y + like(self.scale * row_norm(y - x), x) * push

    def _reward(self, x: Tensor, t: float) -> Tensor:
        if t < 1 and t not in self.guided:
            return torch.full((len(x),), torch.nan, device=x.device)
        return self.seen.evaluate(x, t, derivatives=t < 1).reward


class NoiseAscent(_Ascent):
    """ReNO: ascent in noise space of `reward(X(0,1,x_0))`, the norm of x_0 kept.

    `x_0 <- x_0 + rate |x_0| g / |g|`, then back to its own norm, theory (49). The publication
    (2406.04312) has a penalty instead, `|x_0|²/2 - (d - 1) log |x_0|`, theory (48); a strong one
    holds the norm at `sqrt(d - 1)`, which in high dimension is nearly every row's own, so that the
    two agree. The gradient is normalised for each row, in place of clipped Nesterov momentum. The
    best picture on the way is kept.

    Args:
        flow: the flow map, prompts already bound.
        potential: the reward of x_0's picture, with its controls; `whole_reward` makes one.
        iterations: steps of ascent.
        rate: length of a step as a share of the norm; it falls to zero as a cosine.
        jumps: how many composed jumps make the picture that is ascended.
        finish: how many make the picture that is returned, if not those.
        batch_size: the most rows in one network call; None: all at once.

    Raises:
        ValueError: a rate that is not above zero, or less than one iteration or jump.
    """

    def __init__(
        self,
        flow: FlowMap,
        potential: Potential,
        iterations: int,
        rate: float = 0.15,
        jumps: int = 1,
        finish: int | None = None,
        batch_size: int | None = None,
    ) -> None:
        super().__init__(potential, flow, batch_size)
        if not rate > 0:
            raise ValueError(f"rate must be above zero, got {rate}: it is a share of the norm")
        counts = {"iterations": iterations, "jumps": jumps, "finish": finish}
        for name, count in counts.items():
            if count is not None and count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}")
        self.iterations, self.rate, self.jumps, self.finish = iterations, rate, jumps, finish

    def steps(
        self, x0: Tensor, seed: int = 0, *, position: int = 0, stop: Stop | None = None
    ) -> Iterator[Population]:
        """Yield the best noise so far (time 0) after each step, and in the end its picture.

        The last of the `iterations` looks moves nothing: its reward only counts for the best.
        """
        yield from copy.copy(self)._steps(x0, position, stop)

    def _steps(self, x0: Tensor, position: int, stop: Stop | None) -> Iterator[Population]:
        self._begin(x0, position)
        self.count = self.iterations
        x = x0.detach().reshape(self.p * self.n, *self.flow.event_shape)
        norm = row_norm(x)
        best, height = x, torch.full_like(norm, -torch.inf)
        for k in range(self.iterations):
            with torch.no_grad():
                self.k, last = k, k == self.iterations - 1
                seen = self.seen.evaluate(x, 0.0, derivatives=not last)
                better = seen.reward > height
                best = torch.where(like(better.to(x), x) > 0, x, best)
                height = torch.where(better, seen.reward.to(height), height)
                if seen.gradient is not None:
                    x = self._step(x, seen.gradient, norm, k)
                population = self._population(best, 0.0, height)
            if last or (stop is not None and stop(population)):
                break
            yield population
        with torch.no_grad():
            jumps = self.jumps if self.finish is None else self.finish
            for i in range(jumps):
                best = self.shared.jump(best, i / jumps, (i + 1) / jumps)
            yield self._population(best, 1.0, self.seen.evaluate(best, 1.0).reward)

    def _step(self, x: Tensor, gradient: Tensor, norm: Tensor, k: int) -> Tensor:
        rate = self.rate * 0.5 * (1 + math.cos(math.pi * k / self.iterations))
        y = x + like(rate * norm, x) * direction(gradient)
        return direction(y) * like(norm, x)
