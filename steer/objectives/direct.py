"""Ascent of the reward through the sampler itself: one jump, several, or a truncated rollout."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from steer.flow import composed
from steer.guidance.control import direction
from steer.objectives.batch import Batch, Objective
from steer.objectives.parts import action, consistency, noise_displacement, penalties, squared

__all__ = ["Direct", "Draft"]


def ascend(batch: Batch, x_1: Tensor, normalise: float | None) -> tuple[Tensor, Tensor]:
    """Return a loss whose gradient is the reward's, (n,), and R itself without a gradient, (n,).

    Args:
        batch: the batch.
        x_1: where the reward is evaluated, with its graph.
        normalise: norm to which each row's gradient is rescaled; None: no rescaling.
    """
    if normalise is None:
        value = batch.score(x_1)
        return -value, value.detach()
    leaf = x_1.detach().requires_grad_()
    value = batch.score(leaf)
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    push = normalise * direction(gradient)
    return -(push * x_1).flatten(1).sum(1), value.detach()


class Direct(Objective):
    """`-R(X(0,1,x_0))` through one jump, or through several at random times, with penalties.

    `loss = E[-R(x_1) + Σ penalties]`, `x_1 = X(t_k,1, ... X(0,t_1,x_0))`: DRaFT (Clark et al.
    2023, arXiv 2309.17400) with the map in place of the sampler's last step: nothing is truncated,
    and the gradient is that of the sampled picture.

    With one jump and only `anchor` the optimum is known: each noise sample is mapped to the y that
    maximises `R(y) - anchor/2 |y - X_b(0,1,x_0)|²`. For a linear reward, `R = a·x`, that is the
    base's picture moved by `a / anchor`: mean `E_b[x] + a / anchor`, covariance as the base's.
    With anchor 1 it maximises `E[R] - ½ E|X_θ - X_b|²`, a transport cost of straight lines.

    Args:
        jumps: number of jumps for a batch: one of these, at random.
        anchor: weight of the control energy of each jump, `(t-s)/2 |v_θ - v_b|²`; at one jump it
            is `½ |X_θ - X_b|²`.
        data_anchor: weight of `½ |x_1 - x_1'|²`, with x_1' the reference's picture of the same
            noise.
        noise_anchor: weight of `½ |z - z'|²`, with z and z' the noise that the base's flow maps to
            x_1 and x_1'.
        consistency: weight of the map's consistency, theory (7), between random times. It
            transfers what one jump learns to the jumps that compose it.
        normalise: rescale each row's reward gradient to this norm; None: no rescaling. With it
            the quantity that is maximised is no longer R itself, and the temperature has no
            effect.
        reference: what the anchors measure the distance from: the base, or the running average of
            the adapters.
    """

    per_call = False

    def __init__(
        self,
        jumps: Sequence[int] = (1, 2, 4),
        anchor: float = 1.0,
        data_anchor: float = 0.0,
        noise_anchor: float = 0.0,
        consistency: float = 0.0,
        normalise: float | None = None,
        reference: Literal["base", "average"] = "base",
    ) -> None:
        super().__init__()
        if not jumps or min(jumps) < 1:
            raise ValueError(f"jumps must be numbers of at least 1, got {list(jumps)}")
        penalties(
            anchor=anchor, data_anchor=data_anchor, noise_anchor=noise_anchor,
            consistency=consistency,
        )  # fmt: skip
        if reference not in ("base", "average"):
            raise ValueError(f"reference must be 'base' or 'average', got {reference!r}")
        self.jumps, self.normalise, self.reference = list(jumps), normalise, reference
        self.anchor, self.consistency = anchor, consistency
        self.data_anchor, self.noise_anchor = data_anchor, noise_anchor

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return {"loss", "reward", "action", ...}."""
        held = batch.base if self.reference == "base" else batch.average
        x_0 = batch.noise()
        count = self.jumps[batch.draws.choice(len(self.jumps))]
        inner = batch.draws.uniform((count - 1,)).sort(1).values.unbind(1) if count > 1 else ()
        start, spent = batch.zeros(), batch.zeros()
        times, x = [start, *inner, start + 1], x_0
        for s, t in pairwise(times):
            y = batch.student.jump(x, s, t)
            if self.anchor:
                spent = spent + action(batch.student, held, x, s, t, y)
            x = y
        loss, value = ascend(batch, x, self.normalise)
        loss = loss + self.anchor * spent
        out = {"reward": value.mean() * batch.temperature, "action": spent.detach().mean()}
        if self.data_anchor or self.noise_anchor:
            with torch.no_grad():
                plain = composed(held, x_0, times)
        if self.data_anchor:
            loss = loss + self.data_anchor / 2 * squared(x - plain)
        if self.noise_anchor:
            moved = noise_displacement(batch.base, x)
            with torch.no_grad():
                home = noise_displacement(batch.base, plain)
            loss = loss + self.noise_anchor / 2 * squared(moved - home)
        total = loss.mean()
        if self.consistency:
            s, u, t = batch.draws.uniform((3,)).sort(1).values.unbind(1)
            s = torch.where(batch.draws.uniform() < 0.35, 0.0, s)
            t = torch.where(batch.draws.uniform() < 0.35, 1.0, t)
            with torch.no_grad():
                at = batch.student.jump(x_0, batch.zeros(), s)
            gap = consistency(batch.student, at, s, u, t).mean()
            total = total + self.consistency * gap
            out["consistency"] = gap.detach()
        return {"loss": total, **out}


class Draft(Objective):
    """A rollout of `steps` velocity steps, the reward's gradient through the last `last` of them.

    DRaFT-K (Clark et al. 2023, arXiv 2309.17400), AlignProp (Prabhudesai et al. 2023, arXiv
    2310.03739): the baseline that needs no flow map. The gradient is truncated, so it has no
    optimum of its own: early stopping and the adapters' scale are its only regularisation.

    Args:
        steps: Euler steps of a rollout.
        last: how many of them have a gradient.
        anchor: weight of `½ ∫ |v_θ - v_b|² dt` over the steps that have a gradient.
    """

    per_call = False

    def __init__(self, steps: int = 8, last: int = 1, anchor: float = 0.0) -> None:
        super().__init__()
        if not 1 <= last <= steps:
            raise ValueError(f"last must be between 1 and steps = {steps}, got {last}")
        penalties(anchor=anchor)
        self.steps, self.last, self.anchor = steps, last, anchor

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return {"loss", "reward"}."""
        x, h = batch.noise(), 1 / self.steps
        spent = batch.zeros()
        for k in range(self.steps):
            with torch.set_grad_enabled(k >= self.steps - self.last):
                v = batch.student.velocity(x, k * h)
                if self.anchor and k >= self.steps - self.last:
                    spent = spent + h / 2 * squared(v - batch.base.velocity(x, k * h))
                x = x + h * v
        value = batch.score(x)
        loss = (-value + self.anchor * spent).mean()
        return {"loss": loss, "reward": value.detach().mean() * batch.temperature}
