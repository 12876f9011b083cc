"""The exponential tilt by adjoint matching: a rollout with noise, and its lean adjoint."""

from itertools import pairwise

import torch
from torch import Tensor

from steer.objectives.batch import Batch, Objective
from steer.objectives.parts import distil, penalties, squared
from steer.path import Path, as_time, like

__all__ = ["Adjoint", "memoryless"]


def memoryless(path: Path, s: float, t: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return A, B and V of the step `x_t = A x_s + B D_s(x_s) + sqrt(V) z`, 0-d each.

    With `k = β_s/β_t` and `τ² = α_s² - k² α_t²`, `x_s = k x_t + τ ε`, so that, given x_1,

        A = k α_t² / α_s²,   B = β_t τ² / α_s²,   V = α_t² τ² / α_s²

    For small t - s it is a step of `dx = (2 b - (β'/β) x) dt + σ dW`, `σ²/2 = (β'/β) α² - α' α`,
    whose end forgets where it began: from s = 0, A is zero. Unlike Euler and Maruyama's, it needs
    no bound on σ there. It is the ancestral step of Ho et al. (2020, arXiv 2006.11239).

    Args:
        path: the interpolation.
        s: start, below 1.
        t: end, above s.
    """
    k, v = path.renoise(t, s)
    (a, _), (alpha, beta) = path(as_time(s)), path(as_time(t))
    return k * alpha**2 / a**2, beta * v / a**2, alpha**2 * v / a**2


class Adjoint(Objective):
    """Adjoint matching: regress the velocity on the base's, moved by a lean adjoint.

    The student is rolled out by `memoryless` steps. Starting from `a = -∇R(x_1)` the adjoint is
    computed backwards through the base only, `a_s = A a_t + (∇D_s)ᵀ B a_t`, and

        loss = |v_θ - b + (σ²/2) a|²   at some of the steps,   σ²/2 = (β'/β) α² - α' α,

    σ²/4 times the published `|2 (v_θ - b)/σ + σ a|²`: another weight of the times, that is neither
    zero at noise nor infinite at data. Only at the optimum is `-E[a | x_t]`, on policy, `∇V_t`, so
    the fixed point is `b + (σ²/2) ∇V`, the velocity of `p exp(R) / Z`, up to O(1/steps). At t = 0,
    where σ is infinite and a zero, `(α²/β) a` is taken one step later. There are no weights
    exp(R), so a strong tilt adds little variance; a step of the rollout costs one call of the
    student, and one of the base with its gradient in x.

    Domingo-Enrich et al. (2024, arXiv 2409.08861). The map follows the velocity by
    self-distillation, at the interpolant of noise and the rollout's ends.

    Args:
        steps: steps of a rollout, at least 2. Their times change from batch to batch.
        subset: how many of them are in the loss, spread over all.
        distil: weight of the self-distillation; 0 tunes no jumps.
        step: shortest and longest Heun step of it.

    Raises:
        ValueError: an option out of its range; the message says what it may be.
    """

    per_call = False

    def __init__(
        self,
        steps: int = 16,
        subset: int = 4,
        distil: float = 1.0,
        step: tuple[float, float] = (0.03, 0.13),
    ) -> None:
        super().__init__()
        if steps < 2:
            raise ValueError(f"steps must be at least 2, got {steps}: 16 or more are accurate")
        if not 1 <= subset <= steps:
            raise ValueError(f"subset must be between 1 and steps = {steps}, got {subset}")
        penalties(distil=distil)
        self.steps, self.subset = steps, subset
        self.distil, self.step = distil, tuple(step)

    def rollout(self, batch: Batch, times: list[float]) -> list[Tensor]:
        """Return the student's states at the times, (n, *event) each."""
        states = [batch.noise()]
        with torch.no_grad():
            for s, t in pairwise(times):
                a, b, v = memoryless(batch.base.path, s, t)
                x, z = states[-1], batch.noise()
                d = batch.student.denoise(x, s)
                states.append(like(a, x) * x + like(b, x) * d + like(v.sqrt(), x) * z)
        return states

    def adjoints(
        self, batch: Batch, times: list[float], states: list[Tensor], last: int = 0
    ) -> tuple[Tensor, list[Tensor]]:
        """Return R, (n,), and the lean adjoint at times[last:], (n, *event) each."""
        with torch.enable_grad():
            end = states[-1].detach().requires_grad_()
            value = batch.score(end)
            (gradient,) = torch.autograd.grad(value.sum(), end)
        found = [-gradient]
        for k in reversed(range(last, self.steps)):
            a, b, _ = memoryless(batch.base.path, times[k], times[k + 1])
            with torch.enable_grad():
                x = states[k].detach().requires_grad_()
                d = batch.base.denoise(x, times[k])
                (back,) = torch.autograd.grad(d, x, like(b, x) * found[0])
            found.insert(0, like(a, x) * found[0] + back)
        return value.detach(), found

    def pull(self, batch: Batch, times: list[float], k: int, now: Tensor, later: Tensor) -> Tensor:
        """Return `(σ²/2) a` at times[k], from the adjoints there and one step later."""
        path, t = batch.base.path, as_time(times[k])
        (alpha, beta), (alpha_dot, beta_dot) = path(t), path.derivative(t)
        gain = beta_dot - alpha_dot * beta / alpha
        if k == 0:
            alpha, beta = path(times[1])
        return like(gain * alpha**2 / beta, now) * (later if k == 0 else now)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return {"loss", "reward", "tilt", "off"}."""
        count = self.steps
        shift = 0.5 + (batch.draws.choice(64) + 0.5) / 64
        times = [0.0, *((k + shift) / count for k in range(count - 1)), 1.0]
        edges = [count * j // self.subset for j in range(self.subset + 1)]
        chosen = [low + batch.draws.choice(high - low) for low, high in pairwise(edges)]
        states = self.rollout(batch, times)
        value, found = self.adjoints(batch, times, states, chosen[0])
        adjoint = dict(enumerate(found, chosen[0]))
        loss = batch.zeros()
        for k in chosen:
            x, t = states[k], times[k]
            with torch.no_grad():
                b = batch.base.velocity(x, t)
            goal = b - self.pull(batch, times, k, adjoint[k], adjoint[k + 1])
            loss = loss + squared(batch.student.velocity(x, t) - goal) / len(chosen)
        tilt = loss.mean() / states[0][0].numel()
        total, out = tilt, {"tilt": tilt.detach()}
        if self.distil:
            x_0, x_1, path = batch.noise(), states[-1], batch.base.path
            off = distil(batch, lambda s: path.interpolate(x_0, x_1, s), *self.step)
            total, out["off"] = tilt + self.distil * off, off.detach()
        return {"loss": total, "reward": value.mean() * batch.temperature, **out}
