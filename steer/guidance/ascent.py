"""Ascent of the reward itself: samplers that follow its gradient, without weights.

They maximise the reward near the model's own samples. They do not sample the exponential tilt and
have no log Z. Their pictures are outputs of the model, and a small step, a window or a reward
threshold (brake) limits reward hacking.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from steer.batches import Batched
from steer.flow import FlowMap, composed
from steer.guidance.checks import Checks
from steer.guidance.control import direction, row_norm
from steer.guidance.population import Population, Rows, check_times
from steer.guidance.potential import Lookahead, Potential
from steer.guidance.state import BatchedPotential, State
from steer.path import like
from steer.ranges import above, count, not_negative
from steer.reward import Rest, Reward, plain

__all__ = ["Ascent", "FlowMapControl", "NoiseAscent", "Sampler", "whole_reward"]


class Sampler(Protocol):
    """What `steer.sample` runs: `Guidance` and the samplers of this module."""

    batch_size: int | None

    def steps(self, x0: Tensor, seed: int = 0, *, position: int = 0) -> Iterator[Population]:
        """Yield the population after each step, and follow the caller's `keep` and `stop`."""


def whole_reward(
    flow: FlowMap, reward: Reward, prompts: Sequence[str] | None, steps: int = 1
) -> Potential:
    """Return the reward of the lookahead, neither ramped nor divided: `reward(X(t,1,x))`."""
    return Lookahead(flow, reward, prompts, 1.0, steps, ramp=torch.ones_like)


class Ascent:
    """The state of one run of a sampler without weights: rows, micro-batches, checks.

    Args:
        flow: the flow map.
        potential: how the reward is evaluated.
        batch_size: maximum number of rows in one network call; None: all at once.
        x0: the start, (n, *event) or (p, n, *event).
        position: index of the first prompt in the caller's whole list.
        count: number of steps of the run.
        drop: see `BatchedPotential`.
    """

    def __init__(
        self,
        flow: FlowMap,
        potential: Potential,
        batch_size: int | None,
        x0: Tensor,
        position: int,
        count: int,
        drop: bool = False,
    ) -> None:
        self.rows = Rows.of(x0, flow.event_shape, position, potential.prompts)
        self.k, self.count = 0, count
        self.flow = Batched(flow, batch_size, self.rows.p)
        self.potential = BatchedPotential(
            potential, batch_size, self.rows.p, self._finite, drop=drop
        )
        self.checks, self.drop = Checks(self.rows), drop
        self.x0 = self.rows.flat(x0)
        self.ancestors = self.rows.starts().to(x0.device)

    def at(self, x: Tensor, t: float) -> State:
        """Return the state of rows at t."""
        return State(x, t, self.flow, self.potential)

    def _finite(self, what: str, values: Tensor) -> None:
        self.checks.add(what, values, f"step {self.k + 1} of {self.count}")

    def kept(self, population: Population) -> Tensor | None:
        """Return the rows that the caller chose to keep, if any."""
        wish = population.wish.keep
        if wish is None:
            return None
        kept = self.rows.kept(wish).to(self.x0.device)
        self.ancestors = self.ancestors[kept]
        return kept

    def population(
        self,
        x: Tensor,
        t: float,
        reward: Tensor,
        images: Tensor | None = None,
        clean: Tensor | None = None,
    ) -> Population:
        """Return the population for the caller, after checking that all its values are finite."""
        (seen,) = self.checks.read(reward)
        if self.drop and t == 1:
            self.rows.refuse_no_weight(seen.reshape(self.rows.p, self.rows.n))
        return self.rows.population(x, t, reward, images, ancestors=self.ancestors, clean=clean)


class FlowMapControl:
    """FMRG-J: the map's own steps, each with a gradient step on the reward of the lookahead.

    `x <- X(s,t,x) + (t - s) scale |u| g / |g|`, theory (47), with the unguided mean velocity
    `u = (X(s,t,x) - x) / (t - s)` and `g = ∇ reward(X(s,1,x))`: deterministic optimal control,
    theory (46) (2604.27147), with its gradient normalised to the velocity's norm. If
    not `relative`, `x <- X(s,t,x) + (t - s) scale g`, the publication's equation. It tilts by
    transport cost, not exponentially, and over-concentrates inside a mode (2606.02884): keep the
    scale small.

    Args:
        flow: the flow map, prompts already bound.
        potential: the reward as evaluated at t, with its controls; `whole_reward` makes one.
        times: increasing, in [0, 1].
        scale: length of the gradient step relative to the velocity; if not `relative`, the
            factor of the gradient.
        guided: the times at which to guide. Default: at the start of every step.
        batch_size: maximum number of rows in one network call; None: all at once.
        relative: whether the gradient is scaled to the length of the velocity.

    Raises:
        ValueError: times that do not increase within [0, 1], a time of `guided` that is not among
            them, or a negative scale.
    """

    drop = False

    def __init__(
        self,
        flow: FlowMap,
        potential: Potential,
        times: Sequence[float],
        scale: float = 0.3,
        guided: Sequence[float] | None = None,
        batch_size: int | None = None,
        relative: bool = True,
    ) -> None:
        self.flow, self.potential, self.batch_size = flow, potential, batch_size
        check_times(times)
        not_negative("scale", scale, ": a negative scale would lower the reward")
        self.times, self.scale, self.relative = list(times), scale, relative
        begun = self.times[:-1]
        wanted = begun if guided is None else guided
        self.guided = [s for s in begun if any(abs(s - t) < 1e-9 for t in wanted)]
        if len(self.guided) < len(wanted):
            raise ValueError(f"cannot guide at {list(wanted)}: the steps begin at {begun}")

    def steps(self, x0: Tensor, seed: int = 0, *, position: int = 0) -> Iterator[Population]:
        """Yield the population after each step; deterministic, the seed is not used.

        The population's reward is evaluated where the next step is guided, and at t = 1; elsewhere
        it is NaN. `population.keep` and `population.stop` as in `Guidance.steps`.
        """
        times, guided = list(self.times), self.guided
        asked = Rest(*self.potential.asked)
        with plain():
            run = Ascent(
                self.flow, self.potential, self.batch_size, x0, position, len(times) - 1, self.drop
            )
        here = run.at(run.x0, times[0])
        while run.k + 1 < len(times):
            t = times[run.k + 1]
            with plain(asked), torch.no_grad():
                x = self._step(here, t) if here.t in guided else here.jump(t)
                here = run.at(x, t)
                population = self._population(run, here)
            run.k += 1
            yield population
            with plain(), torch.no_grad():
                kept = run.kept(population)
                here = here if kept is None else here.rows(kept)
            if population.wish.stop:  # one jump, without guidance
                times, guided = (
                    [*times[: run.k + 1], *([self.times[-1]] if t < self.times[-1] else [])],
                    [],
                )

    def _step(self, here: State, t: float) -> Tensor:
        gradient = here.evaluation(derivatives=True).gradient
        assert gradient is not None
        y = here.jump(t)
        if not self.relative:
            return y + (t - here.t) * self.scale * gradient
        return y + like(self.scale * row_norm(y - here.x), here.x) * direction(gradient)

    def _population(self, run: Ascent, here: State) -> Population:
        if here.t < 1 and here.t not in self.guided:
            unseen = torch.full((len(here.x),), torch.nan, device=here.x.device)
            return run.population(here.x, here.t, unseen)
        seen = here.evaluation(derivatives=here.t < 1)
        return run.population(here.x, here.t, seen.reward, seen.images, seen.clean)


class NoiseAscent:
    """ReNO: gradient ascent of `reward(X(0,1,x_0))` in noise space, with the norm of x_0 fixed.

    `x_0 <- x_0 + rate |x_0| g / |g|`, then back to its own norm, theory (49). The publication
    (2406.04312) has a penalty instead, `|x_0|²/2 - (d - 1) log |x_0|`, theory (48); a strong
    penalty fixes the norm at `sqrt(d - 1)`, which in high dimension is close to the norm of every
    row, so that the two agree. The gradient is normalised for each row, instead of clipped
    Nesterov momentum. The best picture of the run is returned.

    Args:
        flow: the flow map, prompts already bound.
        potential: the reward of x_0's picture, with its controls; `whole_reward` makes one.
        iterations: steps of ascent.
        rate: length of a step relative to the norm; it falls to zero as a cosine.
        jumps: number of jumps to the picture that is optimised.
        finish: number of jumps to the picture that is returned. Default: as `jumps`.
        batch_size: maximum number of rows in one network call; None: all at once.

    Raises:
        ValueError: a rate that is not above zero, or less than one iteration or jump.
    """

    drop = False

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
        self.flow, self.potential, self.batch_size = flow, potential, batch_size
        above("rate", rate, ": it is a fraction of the norm")
        counts = {"iterations": iterations, "jumps": jumps, "finish": finish}
        for name, number in counts.items():
            if number is not None:
                count(name, number)
        self.iterations, self.rate, self.jumps, self.finish = iterations, rate, jumps, finish

    def steps(self, x0: Tensor, seed: int = 0, *, position: int = 0) -> Iterator[Population]:
        """Yield the best noise so far (time 0) after each step, and in the end its picture.

        The last of the `iterations` makes no step: its reward is only used to select the best.
        `population.keep` continues with some particles, `population.stop` makes the picture.
        """
        asked = Rest(*self.potential.asked)
        with plain():
            run = Ascent(
                self.flow,
                self.potential,
                self.batch_size,
                x0,
                position,
                self.iterations,
                self.drop,
            )
            here = run.at(run.x0, 0.0)
            norm = row_norm(here.x)
            best, height = here.x, torch.full_like(norm, -torch.inf)
        for k in range(self.iterations):
            with plain(asked), torch.no_grad():
                run.k, last = k, k == self.iterations - 1
                seen = here.evaluation(derivatives=not last)
                better = seen.reward > height
                best = torch.where(like(better.to(best), best) > 0, here.x, best)
                height = torch.where(better, seen.reward.to(height), height)
                if seen.gradient is not None:
                    here = run.at(self._step(here.x, seen.gradient, norm, k), 0.0)
                population = run.population(best, 0.0, height)
            if last:
                break
            yield population
            if population.wish.stop:
                break
            with plain(), torch.no_grad():
                kept = run.kept(population)
                if kept is not None:
                    here, best = here.rows(kept), best[kept]
                    height, norm = height[kept], norm[kept]
        with plain(asked), torch.no_grad():
            jumps = self.jumps if self.finish is None else self.finish
            end = run.at(composed(run.flow, best, run.flow.times(jumps)), 1.0)
            seen = end.evaluation()
            population = run.population(end.x, 1.0, seen.reward, seen.images)
        yield population

    def _step(self, x: Tensor, gradient: Tensor, norm: Tensor, k: int) -> Tensor:
        rate = self.rate * 0.5 * (1 + math.cos(math.pi * k / self.iterations))
        y = x + like(rate * norm, x) * direction(gradient)
        return direction(y) * like(norm, x)
