"""Training-free guidance: one sampler, whose parameters give DPS, LGD-MC, FreeDoM, UGD, MPGD, ...

After Ye et al. 2024, arXiv 2409.15761, for any flow map and path. It maximises the reward; it does
not sample the tilt, and there is no log Z.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from steer.flow import FlowMap
from steer.guidance.ascent import Ascent
from steer.guidance.control import direction, row_norm
from steer.guidance.population import Population, check_times
from steer.guidance.potential import (
    Denoised,
    Evaluation,
    Lookahead,
    Potential,
    inverse_temperature,
)
from steer.guidance.state import State
from steer.names import unknown
from steer.noise import Noise, generator
from steer.onto import onto
from steer.path import Path, like
from steer.ranges import above, count, not_negative
from steer.reward import Rest, Reward, plain

__all__ = ["VIEWS", "TrainingFree", "doob", "smoothed"]

VIEWS = {"lookahead": Lookahead, "denoiser": Denoised}
"""Where the reward is evaluated: at the map's end, or at the mean of all ends."""


def doob(path: Path, t: float) -> float:
    """Return c_t, with `b^q = b + c_t ∇V` for a tilt's value V: `c = α² β'/β - α α'`, theory (70).

    On the linear path it is `(1-t)/t`; infinite at t = 0.
    """
    (alpha, beta), (alpha_dot, beta_dot) = path(t), path.derivative(t)
    if float(beta) == 0:
        return math.inf
    return float(alpha**2 * beta_dot / beta - alpha * alpha_dot)


def smoothed(
    view: Literal["lookahead", "denoiser"],
    flow: FlowMap,
    reward: Reward | Callable[..., Tensor],
    prompts: Sequence[str] | None,
    temperature: float | Tensor,
    width: float = 0.0,
    draws: int = 1,
    lookahead: int = 1,
) -> Potential:
    """Return `log mean_i exp R(x̂ + γ α_t z_i)`, R the reward over its temperature, no ramp.

    Song et al. 2023, "Loss-guided diffusion models for plug-and-play controllable generation"
    (ICML). The samples z are the same at every t and for all rows. At t = 1 there is no noise,
    unless the potential's `level` is set to a time, whose α is then used. TFG's inner steps do so:
    they ascend the reward of the clean view with the noise level of the step (Ye et al. 2024,
    2409.15761).

    Args:
        view: what x̂ is, one of `VIEWS`.
        flow: the flow map, prompts already bound.
        reward: a Reward or any callable on images.
        prompts: the reward's prompts.
        temperature: in the reward's units.
        width: γ, in the units of x; 0: x̂ itself.
        draws: number of z.
        lookahead: jumps of the lookahead.

    Raises:
        ValueError: an unknown view, a number out of range.
    """
    if view not in VIEWS:
        raise unknown("view", view, VIEWS)
    kind: type[Lookahead] | type[Denoised] = VIEWS[view]  # type: ignore[assignment]
    not_negative("the width of the smoothing", width)
    count("draws", draws)

    class Blurred(kind):  # type: ignore[misc, valid-type]
        """The view with its reward averaged over blurred copies."""

        level: float | None = None

        def _score(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            arrived = t.ndim == 0 and float(t) == 1
            if arrived and self.level is None:
                return super()._score(x, t)
            clean = x if arrived else self._view(x, t)
            k = self._inverse_temperature(x)
            alpha = self.flow.path(t if self.level is None else self.level)[0]
            rewards: list[Tensor] = []
            for i in range(draws):
                z = onto(torch.randn(x.shape[1:], generator=generator("smooth", i)), x.device)
                z = z.to(x.dtype)
                found, images = self._asked(clean + like(width * alpha, x) * z)
                rewards.append(found)
            r = torch.stack(rewards)
            k = like(k, r[0])
            value = ((k * r).logsumexp(0) - math.log(draws)) / k
            return value, images, clean.detach()

    chosen = Blurred if width else kind
    return chosen(flow, reward, prompts, temperature, lookahead, ramp=torch.ones_like)


class TrainingFree:
    """TFG: steps of the map, guided by the reward of the view, theory (71).

    From x at s to t, `recur` times:

        Δ  = h ρ c_s ∇_x V,             V the potential, c_s = `doob`, h c_s at most `cap`
        x̂' = x̂ + μ Σ ∇ R(x̂),           `inner` steps on the clean view x̂, without the network
        x' = X(s,t,x) + Δ + w (x̂' - x̂), w = β_t
        x  <- x' re-noised from t to s, before the next of the `recur`

    ρ alone is DPS (Chung et al. 2022, arXiv 2209.14687); with a blurred potential LGD-MC (Song et
    al. 2023); with recurrence FreeDoM (Yu et al. 2023, 2303.09833); with μ too UGD (Bansal et al.
    2023, 2302.07121); μ alone MPGD (He et al. 2023, 2311.16424); μ alone, steps of the length of
    the velocity and `w = (1-s) β_t` FMRG-E (2604.27147).

    Args:
        flow: the flow map, prompts already bound.
        potential: the reward over its temperature as evaluated at t, without a ramp.
        times: increasing, in [0, 1].
        rho: ρ; 0 for none.
        mu: μ; 0 for none. In the units of x² a nat; with `normalise` a multiple of the velocity.
        inner: steps on the clean view.
        recur: how often each step is repeated.
        normalise: Δ is ρ times, and the inner steps together are μ times, as long as
            `X(s,t,x) - x`, or as the velocity.
        damp: σ, the standard deviation of a mode of the data. Δ is divided by `1 + 2 λ σ²_{1|s}`,
            with `σ²_{1|s} = σ² α² / (α² + β² σ²)` and `λ = ρ / temperature`, what the reward is
            multiplied by: exact for the reward `-|x - c|²` of a Gaussian whose view is its
            denoiser (Dandapanthula, Boffi 2026, arXiv 2606.02884). A reward with another curvature
            needs another σ. None: no damping.
        early: `w = (1-s) β_t`.
        cap: the largest `h c_s`.
        guided: the times at which to guide. Default: at the start of every step.
        blurred: the potential inside of `potential` whose blur the inner steps set, see
            `smoothed`; None: they ascend the reward itself.
        batch_size: maximum number of rows in one network call; None: all at once.

    Raises:
        ValueError: times that do not increase within [0, 1], or a number out of range.
    """

    drop = False

    def __init__(
        self,
        flow: FlowMap,
        potential: Potential,
        times: Sequence[float],
        rho: float = 1.0,
        mu: float = 0.0,
        inner: int = 1,
        recur: int = 1,
        normalise: bool = False,
        damp: float | None = None,
        early: bool = False,
        cap: float = 1.0,
        guided: Sequence[float] | None = None,
        blurred: Any = None,
        batch_size: int | None = None,
    ) -> None:
        check_times(times)
        not_negative("rho", rho)
        not_negative("mu", mu)
        if damp is not None:
            above("damp", damp)
        self.flow, self.potential, self.batch_size = flow, potential, batch_size
        self.times, self.rho, self.mu = list(times), rho, mu
        self.inner, self.recur = count("inner", inner), count("recur", recur)
        self.normalise, self.damp, self.early = normalise, damp, early
        self.cap, self.blurred = above("cap", cap), blurred
        self.guided = list(self.times[:-1] if guided is None else guided)

    def steps(self, x0: Tensor, seed: int = 0, *, position: int = 0) -> Iterator[Population]:
        """Yield the population after each step; the seed is used for re-noising.

        The population's reward is that of the clean view at the start of the step; NaN if the step
        did not evaluate it. `population.keep` and `population.stop` as in `Guidance.steps`.
        """
        times, guided = list(self.times), list(self.guided)
        asked = Rest(*self.potential.asked)
        with plain():
            run = Ascent(
                self.flow, self.potential, self.batch_size, x0, position, len(times) - 1, self.drop
            )
        noise = Noise(
            seed, run.rows.positions, run.rows.n, device=x0.device,
            dtype=torch.promote_types(x0.dtype, torch.float32),
        )  # fmt: skip
        x = run.x0
        while run.k + 1 < len(times):
            s, t = times[run.k], times[run.k + 1]
            with plain(asked), torch.no_grad():
                pushed = any(abs(s - g) < 1e-9 for g in guided)
                if pushed:
                    x, seen = self._step(run, x, s, t, noise.at(run.k))
                else:
                    x, seen = run.flow.jump(x, s, t), None
                population = self._population(run, x, t, seen)
            run.k += 1
            yield population
            with plain(), torch.no_grad():
                kept = run.kept(population)
                x = x if kept is None else x[kept]
            if population.wish.stop:  # one jump, without guidance
                end = [self.times[-1]] if t < self.times[-1] else []
                times, guided = [*times[: run.k + 1], *end], []

    def _step(
        self, run: Ascent, x: Tensor, s: float, t: float, noise: Noise
    ) -> tuple[Tensor, Evaluation]:
        """Return the rows at t, and the evaluation at s."""
        for turn in range(self.recur):
            here = run.at(x, s)
            seen = here.evaluation(derivatives=self.rho > 0)
            y = here.jump(t)
            push = self._through(here, s, t, y - x) if self.rho else torch.zeros_like(x)
            if self.mu:
                push = push + self._clean(run, here, s, t, row_norm(y - x) / (t - s))
            y = y + push
            if turn + 1 < self.recur:
                x = self._back(y, t, s, noise)
        return y, seen

    def _through(self, here: State, s: float, t: float, gap: Tensor) -> Tensor:
        """Return Δ, the shift by the gradient through the network."""
        gradient = here.evaluation(derivatives=True).gradient
        assert gradient is not None
        if self.normalise:
            return like(self.rho * row_norm(gap), gap) * direction(gradient)
        push = self.rho * min((t - s) * doob(self.flow.path, s), self.cap) * gradient
        if self.damp is None:
            return push
        alpha, beta = (float(c) for c in self.flow.path(s))
        left = self.damp**2 * alpha**2 / (alpha**2 + beta**2 * self.damp**2)
        strength = self.rho * inverse_temperature(self.potential.temperature, push)
        return push / like(1 + 2 * left * strength, push)

    def _clean(self, run: Ascent, here: State, s: float, t: float, speed: Tensor) -> Tensor:
        """Return `w (x̂' - x̂)`: the shift by the ascent of the clean view."""
        first = here.evaluation().clean
        assert first is not None
        clean = first
        for _ in range(self.inner):
            with self._blurred_as_at(s):
                gradient = run.at(clean, 1.0).evaluation(derivatives=True).gradient
            assert gradient is not None
            if self.normalise:
                length = self.mu / self.inner * speed
                clean = clean + like(length, clean) * direction(gradient)
            else:
                clean = clean + self.mu * gradient
        beta = float(self.flow.path(t)[1])
        return beta * (1 - s if self.early else 1.0) * (clean - first)

    @contextmanager
    def _blurred_as_at(self, s: float) -> Iterator[None]:
        """Blur the clean view with the noise level of a state at s."""
        if self.blurred is None:
            yield
            return
        self.blurred.level = s
        try:
            yield
        finally:
            self.blurred.level = None

    def _back(self, y: Tensor, t: float, s: float, noise: Noise) -> Tensor:
        """Re-noise rows from t back to s."""
        k, variance = (float(c) for c in self.flow.path.renoise(t, s))
        return k * y + math.sqrt(variance) * noise.normal(y.shape[1:]).to(y)

    def _population(self, run: Ascent, x: Tensor, t: float, seen: Evaluation | None) -> Population:
        if t == 1:
            end = run.at(x, t).evaluation()
            return run.population(x, t, end.reward, end.images)
        if seen is None:
            return run.population(x, t, torch.full((len(x),), torch.nan, device=x.device))
        return run.population(x, t, seen.reward, clean=seen.clean)
