"""The value of a state, by samples of its clean posterior."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from steer.devices import differentiating
from steer.flow import FlowMap, log_dtype
from steer.guidance.potential import Evaluation, Viewed
from steer.names import unknown
from steer.noise import generator
from steer.path import Time, as_time, like
from steer.ranges import count
from steer.reward import Reward

__all__ = ["GRADIENTS", "Posterior", "PosteriorValue"]

GRADIENTS = ("covariance", "through")


class Posterior(Protocol):
    """A sampler of `p(x_1 | x_t = x)`: `steer.PosteriorMap`, `steer.Glass`, `WeightedRenoise`."""

    def sample(self, x: Tensor, t: Time, n: int, *, noise: Tensor | None = None) -> Tensor:
        """Return samples (n, *x.shape), made from the same normals (n, *event) for all rows."""


class PosteriorValue(Viewed):
    """`r_t(x) = log 1/M Σ exp R(y_i)`, `y_i ~ p(x_1 | x_t = x)`: the tilt's value, theory (72).

    As M grows it is `V_t = log E[e^R | x_t]`, by which the tilt's velocity is exactly `b + c_t ∇V`
    (Meta Flow Maps 2026, arXiv 2601.14430). With `Ratio` weights every M and every sampler is
    exact in the limit of many particles, because all increments cancel except `R` at the end;
    better posterior samples only make the weights more even. There are two gradients:

        "covariance":  β_t/α_t² Σ (w_i - 1/M) y_i,   w = softmax(R(y)): needs no gradient
        "through":     ∂/∂x of the value, through the draws and the reward

    All states at a time share the same normals, so the value is a function of (x, t):
    micro-batches and other prompts do not change it. With `WeightedRenoise` all candidates are
    used, with their weights instead of 1/M; it has no "through".

    Args:
        flow: its path and its decoder are used.
        reward: a Reward or any callable on images.
        prompts: the reward's prompts, one per prompt.
        temperature: in the reward's units, > 0.
        posterior: the sampler of y.
        draws: M.
        gradient: one of `GRADIENTS`.

    Raises:
        ValueError: an unknown gradient, or "through" for a reward without one.
    """

    def __init__(
        self,
        flow: FlowMap,
        reward: Reward | Callable[..., Tensor],
        prompts: Sequence[str] | None,
        temperature: float | Tensor,
        posterior: Posterior,
        draws: int = 4,
        gradient: Literal["covariance", "through"] = "covariance",
    ) -> None:
        super().__init__(flow, reward, prompts, temperature, ramp=torch.ones_like)
        if gradient not in GRADIENTS:
            raise unknown("gradient", gradient, GRADIENTS)
        if gradient == "through":
            self._need_gradient()
            if hasattr(posterior, "propose"):
                raise ValueError(
                    'weighted re-noising has no gradient: take gradient="covariance", or GLASS'
                )
        self.posterior, self.draws, self.kind = posterior, count("draws", draws), gradient
        self.differentiable = True  # "covariance" has a gradient for any reward

    def _view(self, x: Tensor, t: Tensor) -> Tensor:
        return self._drawn(x, t)[0][0]

    def _drawn(self, x: Tensor, t: Time) -> tuple[Tensor, Tensor]:
        """Return samples, (M, n, *event), and their log-weights, (M, n); the weights sum to 1."""
        count = self.draws
        source: Any = self.posterior
        propose = getattr(source, "propose", None)
        if propose is not None:
            count *= source.candidates
        rng = generator("posterior", round(1e9 * float(as_time(t).max())))
        z = torch.randn(count, *x.shape[1:], generator=rng)
        if propose is not None:
            y, log_w = propose(x, t, count, noise=z)
            return y, log_w.log_softmax(0)
        y = source.sample(x, t, count, noise=z)
        return y, torch.full(y.shape[:2], -math.log(count), device=x.device)

    def evaluate(self, x: Tensor, t: Time, derivatives: bool = False) -> Evaluation:
        """Return the value of the samples, and its gradient."""
        if float(as_time(t).min()) == 1:
            differentiable, self.differentiable = self.differentiable, self.reward.differentiable
            try:
                return super().evaluate(x, t, derivatives)
            finally:
                self.differentiable = differentiable
        through = derivatives and self.kind == "through"
        with differentiating() if through else torch.no_grad():
            if through:
                x = x.detach().requires_grad_()
            y, log_w = self._drawn(x, t)
            rewards = torch.stack([self._asked(part)[0] for part in y])  # (M, n)
            k = self._inverse_temperature(x).to(rewards.dtype)
            scaled = rewards * (k if k.ndim == 0 else k[None])
            value = (scaled + log_w.to(scaled)).logsumexp(0)
            gradient = torch.autograd.grad(value.sum(), x)[0] if through else None
        value, y = value.detach(), y.detach()
        if derivatives and gradient is None:
            alpha, beta = self.flow.path(as_time(t))
            log_w = log_w.to(scaled)
            share = (scaled + log_w).softmax(0) - log_w.exp()
            shaped = share.reshape(*share.shape, *[1] * (x.ndim - 1)).to(y)
            gradient = like(beta / alpha**2, x) * (shaped * y).sum(0)
        return Evaluation(
            value=value.to(log_dtype(x.device)), reward=value / k, gradient=gradient, clean=y[0]
        )
