"""Group-relative policy optimisation of a flow map's stochastic composition: Flow-Map GRPO."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from steer.objectives.batch import Batch, Objective
from steer.objectives.parts import consistency, penalties, squared
from steer.objectives.policy import advantages, whole_group

__all__ = ["GRPO"]

KNOTS = (0.1, 0.7)
"""Range of a rollout's times: earlier a transition has no signal, later hardly any noise."""


class GRPO(Objective):
    """Group-relative policy optimisation of the map: Flow-Map GRPO (2026, arXiv 2607.00535).

    The policy is an anchored stochastic composition of jumps: from x_s to the anchor
    `y = X_θ(s,u,x_s)`, `u = t + churn (1-t)`, and back to t with fresh noise, as `steer.Jump`
    does,

        x_t = k y + sqrt(v) z,   k = beta_t / beta_u,   v = alpha_t² - k² alpha_u²,

    which keeps the marginals at any step size, and `π_θ(x_t | x_s) = N(k y, v)`. The last jump,
    to t = 1, is deterministic. With the advantage A of the reward at the end

        loss = Σ_t ( -A log π_θ(x_t | x_s) + (kl / sigma) k² |y_θ - y_b|² / (2 v) ) / d,

    the second term the divergence of the two Gaussians in closed form. Both are divided by the
    dimension d, as peers do: the sum over thousands of pixels would have huge gradients, and
    the optimum is the same. Rollouts are of the current weights and used once, so the ratio of
    PPO is 1 where its gradient is taken, and its clipping (Liu et al. 2025, Flow-GRPO, arXiv
    2505.05470) would never act, so it is omitted. The transitions are evaluated again with
    gradients.

    With `sigma` the standard deviation of R in the batch (at least .1), the sum of both terms is
    that of `E[R] - kl KL(π_θ | π_b)`, divided by sigma. The optimum over all policies is
    `p exp(R / kl)`; this policy has fixed variances, and cannot choose x_0. The published weight,
    .04 on normalised advantages, is `kl = .04 sigma`.

    Only jumps that are followed by noise are trained: never the last one, nor the velocity. The
    times and the churn are sampled again for each batch, so that jumps between all times are
    trained. With only churn 1, only jumps to the data are trained, and several composed jumps gain
    less. The part `consistency` carries what was learned to the other jumps. (Self-distillation
    would undo it: its teacher is the velocity, which is not trained here.)

    Args:
        steps: jumps of a rollout, at least 2.
        churn: how far beyond t a jump goes before it is re-noised, 1 is to the data: for each jump
            one of these, at random.
        kl: strength of the penalty, in units of the temperature.
        trained: how many transitions have a gradient, chosen at random; None: all.
        consistency: weight of the map's consistency, theory (7), between random times.
        group: rows of each prompt in a batch.
    """

    differentiable = False
    per_call = True  # the advantages of a call share one standard deviation

    def __init__(
        self,
        steps: int = 4,
        churn: Sequence[float] = (0.25, 0.5, 1.0),
        kl: float = 0.1,
        trained: int | None = None,
        consistency: float = 0.0,
        group: int = 8,
    ) -> None:
        super().__init__()
        if steps < 2:
            raise ValueError(
                f"steps must be at least 2, got {steps}: the last jump is deterministic, and "
                "only a jump before it has a likelihood"
            )
        if not churn or min(churn) <= 0 or max(churn) > 1:
            raise ValueError(
                f"churn must be numbers above 0 and at most 1, got {list(churn)}: without noise "
                "there is no likelihood"
            )
        if trained is not None and not 1 <= trained <= steps - 1:
            raise ValueError(
                f"trained must be between 1 and steps - 1 = {steps - 1}, got {trained}"
            )
        penalties(kl=kl, consistency=consistency)
        self.steps, self.churn, self.kl = steps, list(churn), kl
        self.trained, self.consistency, self.group = trained, consistency, whole_group(group)

    def knots(self, batch: Batch) -> list[float]:
        """Sample the times of a rollout, the same for all rows, one in each of `steps - 1` bins.

        They stay away from both ends, where a transition has no signal or no noise.
        """
        low, high = KNOTS
        width = (high - low) / (self.steps - 1)
        draw = [batch.draws.choice(1000) / 1000 for _ in range(self.steps - 1)]
        return [0.0, *(low + (k + c) * width for k, c in enumerate(draw)), 1.0]

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return {"loss", "reward", "spread", "kl"}: kl is the divergence over the dimension."""
        times = self.knots(batch)
        taken: list[tuple[Tensor, float, float, float, float, Tensor]] = []
        with torch.no_grad():
            x = batch.noise()
            d = x[0].numel()
            for s, t in pairwise(times[:-1]):
                u = t + self.churn[batch.draws.choice(len(self.churn))] * (1 - t)
                k, variance = map(float, batch.student.path.renoise(u, t))
                z = batch.noise().to(x)
                y = batch.student.jump(x, s, u)
                taken.append((x, s, u, k, variance, k * y + variance**0.5 * z))
                x = taken[-1][-1]
            value = batch.score(batch.student.jump(x, times[-2], 1.0))
            advantage, sigma = advantages(value, batch.group)
        chosen = self._chosen(batch, len(taken))
        share = len(taken) / len(chosen) / d
        likelihood = divergence = batch.zeros().sum()
        for x, s, u, k, variance, after in (taken[i] for i in chosen):
            y = batch.student.jump(x, s, u)
            with torch.no_grad():
                plain = batch.base.jump(x, s, u)
            log_prob = -squared(after - k * y) / (2 * variance)
            likelihood = likelihood + share * (advantage * log_prob).mean()
            divergence = divergence + share * k**2 * squared(y - plain).mean() / (2 * variance)
        loss = -likelihood + self.kl / sigma.clamp(min=0.1) * divergence
        out = {
            "reward": value.mean() * batch.temperature,
            "spread": sigma * batch.temperature,
            "kl": divergence.detach(),
        }
        if self.consistency:
            start, middle, end = batch.draws.uniform((3,)).sort(1).values.unbind(1)
            with torch.no_grad():
                at = batch.student.jump(batch.noise(), batch.zeros(), start)
            gap = consistency(batch.student, at, start, middle, end).mean()
            loss, out["consistency"] = loss + self.consistency * gap, gap.detach()
        return {"loss": loss, **out}

    def _chosen(self, batch: Batch, count: int) -> list[int]:
        """Choose the transitions that are trained."""
        left = list(range(count))
        if self.trained is None:
            return left
        return [left.pop(batch.draws.choice(len(left))) for _ in range(self.trained)]
