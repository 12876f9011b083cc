"""Objectives that need no gradient of the reward: it is asked, and samples are compared.

Rows of one prompt form a group, and a sample's advantage is what its reward has over the group's
mean. `NFT` contrasts good and bad samples in the forward process; `GRPO` follows the likelihood
ratio of a stochastic composition of jumps. Both are braked in the units of `R`, so the
temperature means what it means to the other objectives.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from steer.flow import FlowMap
from steer.objectives.batch import Batch, Objective
from steer.objectives.parts import consistency, distil, draw_pair_of, squared
from steer.path import like

__all__ = ["GRPO", "NFT", "advantages", "derivative"]

LATEST = 0.98
"""No state later than this is trained: some paths have an infinite velocity at t = 1."""

KNOTS = (0.1, 0.7)
"""Where a rollout's knots are: earlier a transition has no signal, later hardly any noise."""


def advantages(value: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Return `A = (R - mean of its group) / sigma`, (n,), and sigma, ().

    `sigma² = Σ (R - mean)² / (n - n/group)` is pooled over the groups: with four rows a prompt,
    each group's own deviation would be noise, and a group whose rewards hardly differ would
    shout. It is at least 1e-5 of the largest |R|, so that rounding is no advantage.

    Args:
        value: R of the rows, prompt-major, (n,).
        group: rows of each prompt.

    Raises:
        ValueError: a group of one.
    """
    if group < 2:
        raise ValueError(
            "a group of 1 row has no advantage, because its mean is its own reward: give the "
            "batch at least 2 rows of each prompt (fewer prompts at a time, or a larger batch)"
        )
    rows = value.reshape(-1, group)
    centred = rows - rows.mean(1, keepdim=True)
    sigma = (centred.square().sum() / (len(value) - len(rows))).sqrt()
    sigma = sigma.clamp(min=1e-5 * float(value.abs().max()) + 1e-12)
    return (centred / sigma).flatten(), sigma


def derivative(
    flow: FlowMap, x: Tensor, s: Tensor, t: Tensor, v: Tensor, step: float = 0.01
) -> Tensor:
    """Return `d = ∂_s u + ∇u·v` of the mean velocity `u = (X(s,t,x) - x) / (t-s)`, (n, *event).

    With `X(s,t,x) = x + (t-s) u(x,s,t)`, the Eulerian equation `∂_s X + ∇X·b_s = 0` reads

        b - u + (t-s) (∂_s u + ∇u·b) = 0,   so   b = u - (t-s) d   at v = b_s(x):

    the MeanFlow identity (Geng et al. 2025, arXiv 2505.13447) with noise at t = 0, where it is
    the start of the interval that moves. d is a difference along `x + h v` at `s + h`: central,
    and one-sided within a step of s = 0.

    Args:
        flow: a flow map.
        x: points at s, (n, *event).
        s: starts, (n,).
        t: ends, (n,), at least two steps after s.
        v: the direction, (n, *event).
        step: half the span of the difference, in time.
    """

    def u(at: Tensor) -> Tensor:
        y = x + like(at - s, x) * v
        return (flow.jump(y, at, t) - y) / like(t - at, x)

    low, high = (s - step).clamp(min=0), s + step
    with torch.autocast(x.device.type, enabled=False):  # a difference of near values
        return (u(high) - u(low)) / like(high - low, x)


class NFT(Objective):
    """DiffusionNFT (Zheng et al. 2025, arXiv 2509.16117) on a two-time map, MeanFlowNFT.

    The average policy ("old") draws x_1, and `A` is its advantage, `r = ½ + ½ clamp(A/clip, -1,
    1)` its optimality. In the forward process `x_s = alpha x_0' + beta x_1`, with fresh noise,
    `v = alpha' x_0' + beta' x_1`, and

        loss = r |V⁺ - v|² + (1-r) |V⁻ - v|² + brake |V_θ - v_b|²,
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

        β δ = E[(2r-1) (v - v_old) | x_s] = Cov(A, v | x_s) / clip

    where no advantage is clipped: the first-order change of the velocity under the tilt
    `exp(eps A)`, `eps = 1 / (β clip)`. A small β is thus a large step, 2 deviations of the reward
    at the published β = .1 and clip = 5. The average follows, so it goes on until the brake
    balances it. The brake is `kl β / (clip sigma)`, with sigma the deviation of R in the batch
    (at least .1): the advantage's scale cancels, and at rest

        v_θ - v_b = Cov_θ(R, v | x_s) / kl,

    the velocity of `p exp(R / kl)` where that covariance does not change along the tilt (exactly
    so for a linear reward of Gaussian data), and its first order elsewhere: where the reward is
    steeper under the tilt than under the base it gains more than that law. The published brake
    of 1e-4 is `kl = .005 sigma`, as good as none in hundreds of steps.

    Args:
        beta: β, how far V^± mix the tuned policy in.
        kl: strength of the brake, in units of the temperature.
        clip: the advantage, in deviations, that counts as best.
        jumps: how many jumps draw x_1: one of these, at random.
        diagonal: share of the steps on s = t.
        distil: weight of the self-distillation of the map from its diagonal.
        group: rows of each prompt in a batch.
    """

    differentiable = False

    def __init__(
        self,
        beta: float = 0.1,
        kl: float = 0.1,
        clip: float = 5.0,
        jumps: Sequence[int] = (1, 2, 4),
        diagonal: float = 0.5,
        distil: float = 0.0,
        group: int = 4,
    ) -> None:
        super().__init__()
        _positive(beta=beta, clip=clip)
        _brakes(kl=kl, distil=distil)
        if not jumps or min(jumps) < 1:
            raise ValueError(f"jumps must be numbers of at least 1, got {list(jumps)}")
        if not 0 <= diagonal <= 1:
            raise ValueError(f"diagonal must be a share of the steps, 0 to 1, got {diagonal}")
        self.beta, self.kl, self.clip, self.jumps = beta, kl, clip, list(jumps)
        self.diagonal, self.distil, self.group = diagonal, distil, _group(group)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return {"loss", "reward", "spread", "moved"}: spread is sigma, moved `|V_θ - V_b|²`."""
        with torch.no_grad():
            x_1 = batch.noise()
            count = self.jumps[batch.draws.choice(len(self.jumps))]
            for k in range(count):
                x_1 = batch.average.jump(x_1, k / count, (k + 1) / count)
            value = batch.score(x_1)
            advantage, sigma = advantages(value, batch.group)
            sign = (advantage / self.clip).clamp(-1, 1)  # 2 r - 1
        student, old, base, v = self._velocities(batch, x_1)
        plus, minus = (old + c * self.beta * (student - old) - v for c in (1, -1))
        r = (sign + 1) / 2
        d = x_1[0].numel()
        contrast = (r * squared(plus) + (1 - r) * squared(minus)).mean() / d
        moved = squared(student - base).mean() / d
        loss = contrast + self.kl * self.beta / (self.clip * sigma.clamp(min=0.1)) * moved
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


class GRPO(Objective):
    """Group-relative policy optimisation of the map: Flow-Map GRPO (2026, arXiv 2607.00535).

    The policy is an anchored stochastic composition of jumps: from x_s to the anchor
    `y = X_θ(s,u,x_s)`, `u = t + churn (1-t)`, and back to t with fresh noise, as `steer.Jump`,

        x_t = k y + sqrt(v) z,   k = beta_t / beta_u,   v = alpha_t² - k² alpha_u²,

    which keeps the marginals at any step size, and `π_θ(x_t | x_s) = N(k y, v)`. The last jump,
    to t = 1, is deterministic. With the advantage A of the reward at the end

        loss = Σ_t ( -A log π_θ(x_t | x_s) + (kl / sigma) k² |y_θ - y_b|² / (2 v) ) / d,

    the second term the divergence of the two Gaussians in closed form. Both are divided by the
    dimension d, as peers do: the sum over thousands of pixels would have huge gradients, and
    the optimum is the same. Rollouts are of the current weights and used once, so the ratio of
    PPO is 1 where its gradient is taken, and its clip (Liu et al. 2025, Flow-GRPO, arXiv
    2505.05470) never acts: there is none. The transitions are evaluated again with gradients.

    `sigma` is the deviation of R in the batch (at least .1), so the sum is that of
    `E[R] - kl KL(π_θ | π_b)` per sigma: the optimum over all policies is `p exp(R / kl)`; this
    one has its variances fixed, and cannot choose x_0. The published weight, .04 on normalised
    advantages, is `kl = .04 sigma`.

    Only jumps that a noise follows are trained: never the last one, nor the velocity. The knots
    and the churn are drawn anew for each batch, so that jumps between all times are trained in
    some; with churn 1 alone, only jumps to the data are, and several composed jumps gain less.
    The part `consistency` carries what was learned to the other jumps. (Self-distillation would
    undo it: its teacher is the velocity, which learns nothing here.)

    Args:
        steps: jumps of a rollout, at least 2.
        churn: how far beyond t the anchor is, 1 all the way to the data: for each jump one of
            these, at random.
        kl: strength of the brake, in units of the temperature.
        trained: how many transitions have a gradient, chosen at random; None: all.
        consistency: weight of the map's consistency, theory (7), between random times.
        group: rows of each prompt in a batch.
    """

    differentiable = False

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
                "there is no likelihood to follow"
            )
        if trained is not None and not 1 <= trained <= steps - 1:
            raise ValueError(
                f"trained must be between 1 and steps - 1 = {steps - 1}, got {trained}"
            )
        _brakes(kl=kl, consistency=consistency)
        self.steps, self.churn, self.kl = steps, list(churn), kl
        self.trained, self.consistency, self.group = trained, consistency, _group(group)

    def knots(self, batch: Batch) -> list[float]:
        """Draw the times of a rollout, the same for all rows, one in each of `steps - 1` bins.

        They keep away from both ends, where a transition has no signal, or no noise.
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
                (alpha_t, beta_t), (alpha_u, beta_u) = batch.student.path(t), batch.student.path(u)
                k = float(beta_t / beta_u)
                variance = float(alpha_t) ** 2 - k**2 * float(alpha_u) ** 2
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


def _forward(batch: Batch, x_1: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Draw `x_s = alpha x_0 + beta x_1` and its velocity, with fresh noise."""
    x_0 = batch.noise().to(x_1)
    (alpha, beta), (alpha_dot, beta_dot) = batch.base.path(s), batch.base.path.derivative(s)
    x = like(alpha, x_1) * x_0 + like(beta, x_1) * x_1
    return x, like(alpha_dot, x_1) * x_0 + like(beta_dot, x_1) * x_1


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name} must be above 0, got {value}")


def _brakes(**values: float) -> None:
    for name, value in values.items():
        if value < 0:
            raise ValueError(f"{name} must not be negative, got {value}: it is a brake")


def _group(group: int) -> int:
    if group < 2:
        raise ValueError(
            f"group must be at least 2, got {group}: a sample is compared with others of its "
            "prompt; 4 to 8 do well"
        )
    return group
