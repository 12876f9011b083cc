"""Contrast of good and bad samples in the forward process, on a two-time map: DiffusionNFT."""

from collections.abc import Sequence

import torch
from torch import Tensor

from steer.flow import composed
from steer.objectives.batch import Batch, Objective
from steer.objectives.derivative import derivative
from steer.objectives.parts import distil, draw_pair_of, penalties, squared
from steer.objectives.policy import advantages, whole_group
from steer.path import like

__all__ = ["NFT"]

LATEST = 0.98
"""The latest time of a trained state, because some paths have an infinite velocity at t = 1."""


class NFT(Objective):
    """DiffusionNFT (Zheng et al. 2025, arXiv 2509.16117) on a two-time map, MeanFlowNFT.

    The average policy ("old") samples x_1, and `A` is its advantage, `r = ½ + ½ clamp(A/m, -1, 1)`
    its optimality, m being `max_advantage`. In the forward process `x_s = alpha x_0' + beta x_1`,
    with fresh noise, `v = alpha' x_0' + beta' x_1`, and

        loss = r |V⁺ - v|² + (1-r) |V⁻ - v|² + penalty |V_θ - v_b|²,
        V^± = (1 ∓ β) v_old ± β V_θ,

    means over the event. On a share of the steps s = t and `V_θ = v_θ(x_s)`: plain DiffusionNFT.
    On the others it is the velocity that the map's jumps s -> t imply (MeanFlowNFT, 2026, arXiv
    2607.15273, by the identity at `derivative`), taken as what has changed since the base:

        V_θ = v_b + (u_θ - u_b) - (t-s) sg[d_old - d_b],   u = (X(s,t,x_s) - x_s) / (t-s),

    with d_old and d_b along v_old and v_b. At step 0 it is v_b exactly, however well the base
    keeps the identity. Against v_old and not against u_old the jumps also follow the velocity:
    the published form, which shares d between `V_θ` and `V_old`, lets them drift apart (on a toy
    its one-jump samples ran past the reward's peak). Neither sampler nor likelihood enters.

    With `δ = V_θ - v_old` the loss is `β² |δ|² - 2 β (2r-1) δ·(v - v_old)` and a constant, so for
    a fixed old policy the optimum is

        β δ = E[(2r-1) (v - v_old) | x_s] = Cov(A, v | x_s) / m

    where no advantage is clipped: the first-order change of the velocity under the tilt
    `exp(eps A)`, `eps = 1 / (β m)`. A small β is thus a large step: 2 standard deviations of the
    reward at the published β = .1 and m = 5. The average follows, so tuning continues until the
    penalty balances the advantage. The penalty is `kl β / (m sigma)`, with sigma the standard
    deviation of R in the batch (at least .1): the advantage's scale cancels, and at the fixed
    point

        v_θ - v_b = Cov_θ(R, v | x_s) / kl,

    the velocity of `p exp(R / kl)` where that covariance does not change along the tilt (exactly
    so for a linear reward of Gaussian data), and its first order elsewhere: where the reward is
    steeper under the tilt than under the base it gains more than that law. The published penalty
    of 1e-4 is `kl = .005 sigma`, as good as none in hundreds of steps.

    Args:
        beta: β, how far V^± mix the tuned policy in.
        kl: strength of the penalty, in units of the temperature.
        max_advantage: m, the advantage, in standard deviations, at which the optimality is 1.
        jumps: number of jumps to x_1: one of these, at random.
        diagonal: fraction of the steps with s = t.
        distil: weight of the self-distillation of the map from its diagonal.
        group: rows of each prompt in a batch.
    """

    differentiable = False
    per_call = True  # the advantages of a call share one standard deviation

    def __init__(
        self,
        beta: float = 0.1,
        kl: float = 0.1,
        max_advantage: float = 5.0,
        jumps: Sequence[int] = (1, 2, 4),
        diagonal: float = 0.5,
        distil: float = 0.0,
        group: int = 4,
    ) -> None:
        super().__init__()
        for name, value in {"beta": beta, "max_advantage": max_advantage}.items():
            if not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        penalties(kl=kl, distil=distil)
        if not jumps or min(jumps) < 1:
            raise ValueError(f"jumps must be numbers of at least 1, got {list(jumps)}")
        if not 0 <= diagonal <= 1:
            raise ValueError(f"diagonal must be a fraction of the steps, 0 to 1, got {diagonal}")
        self.beta, self.kl, self.jumps = beta, kl, list(jumps)
        self.max_advantage, self.diagonal = max_advantage, diagonal
        self.distil, self.group = distil, whole_group(group)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return {"loss", "reward", "spread", "moved"}: spread is sigma, moved `|V_θ - V_b|²`."""
        with torch.no_grad():
            x_0 = batch.noise()
            count = self.jumps[batch.draws.choice(len(self.jumps))]
            x_1 = composed(batch.average, x_0, [k / count for k in range(count + 1)])
            value = batch.score(x_1)
            advantage, sigma = advantages(value, batch.group)
            sign = (advantage / self.max_advantage).clamp(-1, 1)  # 2 r - 1
        student, old, base, v = self._velocities(batch, x_1)
        plus, minus = (old + c * self.beta * (student - old) - v for c in (1, -1))
        r = (sign + 1) / 2
        d = x_1[0].numel()
        contrast = (r * squared(plus) + (1 - r) * squared(minus)).mean() / d
        moved = squared(student - base).mean() / d
        weight = self.kl * self.beta / (self.max_advantage * sigma.clamp(min=0.1))
        loss = contrast + weight * moved
        out = {
            "reward": value.mean() * batch.temperature,
            "spread": sigma * batch.temperature,
            "moved": moved.detach(),
        }
        if self.distil:
            off = distil(batch, lambda s: _forward(batch, x_1, s)[0], 0.03, 0.13)
            loss, out["off"] = loss + self.distil * off, off.detach()
        return {"loss": loss, **out}

    def _velocities(self, batch: Batch, x_1: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return V_θ, V_old, V_b and v at random states of the forward process."""
        if batch.draws.choice(1000) < 1000 * self.diagonal:
            s = LATEST * batch.draws.uniform()
            x, v = _forward(batch, x_1, s)
            with torch.no_grad():
                old, base = batch.average.velocity(x, s), batch.base.velocity(x, s)
            return batch.student.velocity(x, s), old, base, v
        step = 0.01
        s, t = draw_pair_of(batch.draws)
        s = s.clamp(max=1 - 4 * step)
        t = torch.maximum(t, s + 4 * step)
        x, v = _forward(batch, x_1, s)
        with torch.no_grad():
            old, base = batch.average.velocity(x, s), batch.base.velocity(x, s)
            turn_old = derivative(batch.average, x, s, t, old, step)
            turn_base = derivative(batch.base, x, s, t, base, step)
            plain = batch.base.jump(x, s, t)
        shift = (batch.student.jump(x, s, t) - plain) / like(t - s, x)  # u_θ - u_b
        return base + shift - like(t - s, x) * (turn_old - turn_base), old, base, v


def _forward(batch: Batch, x_1: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Sample `x_s = alpha x_0 + beta x_1` and its velocity, with fresh noise."""
    x_0, path = batch.noise().to(x_1), batch.base.path
    return path.interpolate(x_0, x_1, s), path.slope(x_0, x_1, s)
