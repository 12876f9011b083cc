"""The transport tilt: `max E[R(x_1) - ½ ∫ |u|² dt]`, theory (46).

Its control is the gradient of a deterministic value, so two jumps of the map estimate it.
"""

import torch
from torch import Tensor

from steer.objectives.batch import Batch, Objective
from steer.objectives.parts import distil, squared
from steer.path import like

__all__ = ["Transport"]


class Transport(Objective):
    """Wasserstein-tilted flow maps (arXiv 2609.27033): regress the velocity on `b + ∇V`.

    `V(t,x) = R(X(τ,1,x_τ)) - (1-t)/2 |u_τ(x_τ)|²`, `x_τ = X(t,τ,x)`, τ uniform on [t, 1],
    `u = v_θ - b`: two jumps of the tuned map estimate the value of theory (46) along its own
    policy, without a critic. On policy at `x_t = X_θ(0,t,x_0)`. The map follows the velocity by
    self-distillation, so all of it stays few-step. The fixed point is the transport optimum,
    `v_θ = b + ∇V*`; it is another law than the exponential tilt.

    Args:
        distil: weight of the self-distillation.
        step: shortest and longest Heun step of it.
        normalise: bound the norm of `∇V` by this multiple of the base velocity's norm; None: no
            bound.
    """

    per_call = False

    def __init__(
        self,
        distil: float = 1.0,
        step: tuple[float, float] = (0.03, 0.13),
        normalise: float | None = None,
    ) -> None:
        super().__init__()
        self.distil, self.step, self.normalise = distil, tuple(step), normalise

    def value_gradient(self, batch: Batch, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return one estimate of V (n,) and its gradient in x, (n, *event)."""
        x = x.detach().requires_grad_()
        tau = t + (1 - t) * batch.draws.uniform()
        with torch.enable_grad():
            x_tau = batch.student.jump(x, t, tau)
            reward = batch.score(batch.student.jump(x_tau, tau, 1.0))
            u = batch.student.velocity(x_tau, tau) - batch.base.velocity(x_tau, tau)
            value = reward - (1 - t) / 2 * squared(u)
            (gradient,) = torch.autograd.grad(value.sum(), x)
        return reward.detach(), gradient

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return {"loss", "reward", "tilt", "off"}."""
        x_0 = batch.noise()
        t = batch.draws.uniform()
        with torch.no_grad():
            x = batch.student.jump(x_0, batch.zeros(), t)
            b = batch.base.velocity(x, t)
        reward, gradient = self.value_gradient(batch, x, t)
        if self.normalise is not None:
            ratio = self.normalise * squared(b).sqrt() / squared(gradient).sqrt().clamp(min=1e-12)
            gradient = gradient * like(ratio.clamp(max=1.0), gradient)
        d = x[0].numel()
        tilt = squared(batch.student.velocity(x, t) - b - gradient).mean() / d
        off = distil(batch, lambda s: batch.student.jump(x_0, batch.zeros(), s), *self.step)
        return {
            "loss": tilt + self.distil * off,
            "reward": reward.mean() * batch.temperature,
            "tilt": tilt.detach(),
            "off": off.detach(),
        }
