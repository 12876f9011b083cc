"""Kernels: transitions of the unguided process, possibly shifted by the potential's gradient.

A kernel proposes `x' = m(x) + shift + sqrt(v) z` with `shift = scale (v / 2) ∇r_s(x)`; the weight
of the shift is `log p(x'|x) - log q(x'|x) = -(|shift|² + 2 sqrt(v) shift·z) / (2 v)`, theory (27).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from steer.flow import FlowMap, per_row
from steer.guidance.potential import Potential
from steer.guidance.state import State
from steer.noise import Noise
from steer.path import like
from steer.ranges import above, count, within

__all__ = ["Adaptation", "Jump", "Kernel", "Langevin", "Sde"]


@dataclass
class Adaptation:
    """Adapted parameters of the moves, for each prompt separately: theory (34).

    Attributes:
        step: the Langevin step as a multiple of `alpha_t²`, (p,); None before the first move.
        acceptance: the mean acceptance of the last move, (p,).
    """

    step: Tensor | None = None
    acceptance: Tensor | None = None


class Kernel(ABC):
    """A transition `x, s -> t` of the unguided process, and moves at fixed t.

    Attributes:
        flow: the flow map whose process this is.
        moves_by_gradient: whether `move` uses the potential's gradient.
    """

    flow: FlowMap
    moves_by_gradient: bool = False

    @abstractmethod
    def propose(
        self, x: Tensor, s: float, t: float, potential: Potential, scale: float, noise: Noise
    ) -> tuple[Tensor, Tensor]:
        """Return (x', log p(x'|x) - log q(x'|x)), (n, *event) and (n,)."""

    def move(
        self,
        x: Tensor,
        t: float,
        potential: Potential,
        noise: Noise,
        run: Adaptation | None = None,
    ) -> Tensor:
        """Move x at time t by a kernel that leaves `rho_t e^{r_t}` invariant. Default: stay."""
        return x

    def refresh(self, here: State, noise: Noise, run: Adaptation | None = None) -> State:
        """Apply `move` to a state; values that are known for the moved rows are passed on."""
        x = self.move(here.x, here.t, here.views()[1], noise, run)
        return here if x is here.x else here.at(x, here.t)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Return the inner product of each row, at least in float32."""
    dtype = torch.promote_types(a.dtype, torch.float32)
    return (a.to(dtype) * b.to(dtype)).flatten(1).sum(1)


def _clipped(shift: Tensor, bound: float) -> Tensor:
    """Shorten the rows whose norm exceeds the bound, theory (28)."""
    return shift * like((bound / _dot(shift, shift).sqrt().clamp(min=1e-30)).clamp(max=1), shift)


def _shifted(
    mean: Tensor,
    variance: float,
    gradient: Tensor | None,
    scale: float,
    clip: float | None,
    noise: Noise,
) -> tuple[Tensor, Tensor]:
    """Sample N(mean + shift, variance); return also its log-ratio to N(mean, variance): (27)."""
    if variance <= 0:
        return mean, torch.zeros_like(_dot(mean[:, :1], mean[:, :1]))
    z = noise.normal(mean.shape[1:]).to(mean)
    sigma = math.sqrt(variance)
    if scale == 0 or gradient is None:
        return mean + sigma * z, torch.zeros_like(_dot(z[:, :1], z[:, :1]))
    shift = scale * (variance / 2) * gradient
    if clip is not None:
        shift = _clipped(shift, clip * math.sqrt(variance * mean[0].numel()))
    log_ratio = -(_dot(shift, shift) + 2 * sigma * _dot(shift, z)) / (2 * variance)
    return mean + shift + sigma * z, log_ratio


class Jump(Kernel):
    """Jump past t to `u = t + churn (1 - t)`, then re-noise back to t: theory (25).

    `y = X(s,u,x)`, `k = beta_t / beta_u`, `x' = k y + sqrt(alpha_t² - k² alpha_u²) z`. With churn
    0 it is the deterministic jump, which is not shifted by a gradient; with 1 it goes to the data
    and back. With churn above 0 the marginals are kept, at any step size, if the flow's velocity
    is that of its path, theory (3), which a guided velocity in general is not (2408.09000).
    Otherwise the law is that of the chain.

    Args:
        flow: the flow map.
        churn: in [0, 1].
        clip: the shift's norm is at most `clip sqrt(variance * dimension)`, theory (28); None: no
            bound.
    """

    def __init__(self, flow: FlowMap, churn: float = 0.0, clip: float | None = 1.0) -> None:
        within("churn", churn, 0.0, 1.0)
        if clip is not None:
            above("clip", clip)
        self.flow, self.churn, self.clip = flow, churn, clip

    def propose(
        self, x: Tensor, s: float, t: float, potential: Potential, scale: float, noise: Noise
    ) -> tuple[Tensor, Tensor]:
        """Return (x', log-ratio): one jump, and the gradient at (x, s) if scale is not 0."""
        u = t + self.churn * (1 - t)
        k, variance = (float(c) for c in self.flow.path.renoise(u, t))
        # the gradient first: a jump may follow from what it asked of the network
        gradient = potential.gradient(x, s)[1] if scale and variance > 0 else None
        y = self.flow.jump(x, s, u)
        return _shifted(k * y, variance, gradient, scale, self.clip, noise)


class Sde(Kernel):
    """An Euler–Maruyama step of `dx = [b + eps s] dt + sqrt(2 eps) dW`, shifted by `eps ∇r dt`.

    The equation is theory (20), its step theory (26).

    Args:
        flow: the flow map, whose velocity and score are used.
        noise: `eps_t` as a function of the time. Default: `1 - t`.
        clip: the shift's norm is at most `clip sqrt(variance * dimension)`, theory (28); None: no
            bound.
        settle: end with the deterministic jump `X(s,1,x)` instead of a noisy last step, whose
            noise would remain in the picture. The jump keeps the marginals like the step.
    """

    def __init__(
        self,
        flow: FlowMap,
        noise: Callable[[float], float] | None = None,
        clip: float | None = None,
        settle: bool = False,
    ) -> None:
        if clip is not None:
            above("clip", clip)
        self.flow, self.noise, self.clip = flow, noise or (lambda t: 1 - t), clip
        self.settle = settle

    def propose(
        self, x: Tensor, s: float, t: float, potential: Potential, scale: float, noise: Noise
    ) -> tuple[Tensor, Tensor]:
        """Return (x', log-ratio): one velocity, and the gradient at (x, s) if scale is not 0."""
        if self.settle and t == 1:
            y = self.flow.jump(x, s, t)
            return y, torch.zeros_like(_dot(y[:, :1], y[:, :1]))
        h, eps = t - s, float(self.noise(s))
        if not 0 <= eps < math.inf:
            raise ValueError(
                f"the noise of the SDE is {eps} at t = {s}: it must be finite and not negative"
            )
        gradient = potential.gradient(x, s)[1] if scale and eps > 0 else None
        drift = self.flow.velocity(x, s)
        if eps > 0:
            drift = drift + eps * self.flow.score(x, s)
        return _shifted(
            x + h * drift,
            2 * eps * h,
            gradient,
            scale,
            self.clip,
            noise,
        )


class Langevin(Kernel):
    """A deterministic jump, then Metropolis-adjusted Langevin moves at t: theory (30).

    A move proposes `y = x + h (s_t + ∇r_t)(x) + sqrt(2 h) z`, theory (31), and accepts it by the
    ratio of `rho_t e^{r_t}`, theory (32) (Roberts, Tweedie 1996). The ratio of `rho_t` is
    `flow.log_prob`'s where the flow knows it, else the line integral of the score by Simpson's
    rule, theory (33). A reward without gradient can be used as well: the proposal then uses only
    the score.

    Without a step size, it is adapted for each prompt, theory (34): `h = c alpha_t²`, c starts at
    .1 and is multiplied by `exp(2 (acceptance - .57))` after each move, and where Simpson's rule
    and the trapezoid differ by more than .1 (median over particles) by `(.1 / that)^(2/3)`.

    Args:
        flow: the flow map.
        moves: moves per step.
        step_size: h, the same at every t; None: adapted.
        adjust: whether to accept or reject; without it the law is biased O(h).
    """

    def __init__(
        self,
        flow: FlowMap,
        moves: int = 1,
        step_size: float | None = None,
        adjust: bool = True,
    ) -> None:
        count("moves", moves, 0)
        if step_size is not None:
            above("step_size", step_size)
        self.flow, self.moves, self.step_size, self.adjust = flow, moves, step_size, adjust
        self.moves_by_gradient = moves > 0

    def propose(
        self, x: Tensor, s: float, t: float, potential: Potential, scale: float, noise: Noise
    ) -> tuple[Tensor, Tensor]:
        """Return (X(s,t,x), 0): the jump is not shifted by the gradient."""
        y = self.flow.jump(x, s, t)
        return y, torch.zeros_like(_dot(y[:, :1], y[:, :1]))

    def move(
        self,
        x: Tensor,
        t: float,
        potential: Potential,
        noise: Noise,
        run: Adaptation | None = None,
    ) -> Tensor:
        """Make the moves; `run` keeps the adapted step from one call to the next."""
        return self._moved(State(x, t, self.flow, potential), noise, run).x

    def refresh(self, here: State, noise: Noise, run: Adaptation | None = None) -> State:
        """Make the moves from a state; none at t = 1."""
        if type(self).move is not Langevin.move:  # a user's kernel, derived from this one
            return super().refresh(here, noise, run)
        return self._moved(here, noise, run)

    def _moved(self, here: State, noise: Noise, run: Adaptation | None) -> State:
        if here.t == 1:
            return here
        run = run if run is not None else Adaptation()
        for _ in range(self.moves):
            here = self._once(here, noise, run)
        return here

    def _once(self, here: State, noise: Noise, run: Adaptation) -> State:
        x, t, p = here.x, here.t, len(noise.prompts)
        if run.step is None:
            run.step = torch.full((p,), 0.1, dtype=torch.float64, device=x.device)
        alpha = float(here.flow.path(t)[0])
        step = run.step * alpha**2
        if self.step_size is not None:
            step = torch.full_like(run.step, self.step_size)
        h = per_row(step, len(x))
        z = noise.normal(x.shape[1:]).to(x)
        y = x + like(h, x) * self._drift(here) + like((2 * h).sqrt(), x) * z
        there = here.at(y, t)
        back = x - y - like(h, x) * self._drift(there)
        if not self.adjust:
            return there
        log_rho, disagreement = self._log_density_ratio(here, there)
        log_q = -_dot(back, back) / (4 * h) + _dot(z, z) / 2
        log_accept = log_rho + there.value - here.value + log_q
        accept = noise.uniform().to(log_accept).log() < log_accept
        if self.step_size is None:
            self._adapt(run, log_accept, disagreement)
        return there.choose(accept, here)

    @staticmethod
    def _drift(at: State) -> Tensor:
        gradient = at.evaluation(derivatives=at.potential.differentiable).gradient
        return at.score if gradient is None else at.score + gradient

    @staticmethod
    def _log_density_ratio(here: State, there: State) -> tuple[Tensor, Tensor | None]:
        """Return `log rho_t(there) - log rho_t(here)`, theory (33), and an error estimate.

        The estimate is the difference of Simpson's rule and the trapezoid; None if the flow knows
        its density.
        """
        x, y, t, flow = here.x, there.x, here.t, here.flow
        log_x, log_y = flow.log_prob(x, t), flow.log_prob(y, t)
        if log_x is not None and log_y is not None:
            return log_y - log_x, None
        trapezoid = _dot((here.score + there.score) / 2, y - x)
        middle = _dot(flow.score((x + y) / 2, t), y - x)
        simpson = trapezoid / 3 + 2 * middle / 3
        return simpson, (simpson - trapezoid).abs()

    @staticmethod
    def _adapt(run: Adaptation, log_accept: Tensor, disagreement: Tensor | None) -> None:
        """Set the step of the next move, theory (34)."""
        assert run.step is not None
        p = len(run.step)
        run.acceptance = log_accept.clamp(max=0).exp().reshape(p, -1).mean(1)
        run.step = run.step * (2 * (run.acceptance.to(run.step) - 0.57)).exp()
        if disagreement is not None:
            off = disagreement.reshape(p, -1).median(1).values.to(run.step)
            run.step = run.step * (0.1 / off.clamp(min=0.1)) ** (2 / 3)
