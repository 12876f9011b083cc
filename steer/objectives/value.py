"""The exponential tilt by its value function.

`p exp(R) / Z` has the velocity `b + (σ²/2) ∇V`, with the value `V_t(x) = log E[exp(R(x_1)) | x_t]`
of theory (19) and `σ²/2 = (β'/β) α² - α' α`. A weighted regression finds it without the logarithm.
"""

import hashlib
import math
from typing import Literal

import torch
from torch import Tensor

from steer.objectives.batch import Batch, Objective
from steer.objectives.parts import distil, penalties, squared
from steer.onto import onto
from steer.path import Path, like
from steer.posterior import glass

__all__ = ["Value", "slot", "tilt_gain"]

SLOTS = 4096
"""Running constants, one for each prompt (two that share one do no harm)."""


def tilt_gain(path: Path, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return κ and `σ²/2` at t in (0, 1), of its shape.

    `κ = β' - α' β/α`, with `b = (α'/α) x + κ D`, carries a change of the denoiser to the velocity;
    `σ²/2 = κ α²/β` carries the gradient of a value. Linear: 1/(1-t) and (1-t)/t.
    """
    (alpha, beta), (alpha_dot, beta_dot) = path(t), path.derivative(t)
    gain = beta_dot - alpha_dot * beta / alpha
    return gain, gain * alpha**2 / beta


def slot(prompt: str) -> int:
    """Return the slot of a prompt's running constant."""
    digest = hashlib.blake2b(prompt.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % SLOTS


class Value(Objective):
    """The exponential tilt: regress the velocity on `b + (σ²/2) ∇V`, by posterior samples of x_1.

    At `x_t`, with `x_1'` sampled from the base's `p(x_1 | x_t)` and `w = exp(R(x_1') - c)`,

        loss = |v_θ - T|²,   T = b - (w - 1) (v_θ - b) + (σ²/2) ∇w,   T without gradient,

    whose gradient, `2 (w (v_θ - b) - (σ²/2) ∇w)`, is linear in w: its mean vanishes exactly at
    `v_θ = b + (σ²/2) ∇ log E[w | x_t]`, the velocity of `p exp(R) / Z`, for any c that does not
    depend on x_1', any number of posterior samples and any law of x_t with full support. Meta flow
    maps, equation 43 (2026, arXiv 2601.14430); it needs a posterior map, and `glass` needs none.

    `(σ²/2) ∇w` is computed in one of two ways. With `gradient`, through `glass` and the reward:
    its error is the inner flow's, which falls with `steps`. Without, by
    `∇E[w|x] = β/α² Cov(w, x_1|x)` as `κ (w - 1) (x_1' - D(x))`, which needs only the reward's
    value; with the base's own points, x_1 itself is one exact sample of the posterior and there is
    no inner flow. Its variance grows with the dimension.

    Points: `x_t = α x_0' + β x_1`, with x_1 one jump of the base from noise (p is the law of those
    jumps), or of the student. t is uniform on [ends, 1 - ends]: `σ²` is infinite at 0, κ at 1, and
    the velocity at the ends is what the network makes of it.

    c is the log-mean of exp(R) over the row's other posterior samples and a running estimate for
    the prompt, so that weights are near 1 and all prompts have a similar weight. The estimate is
    read before a batch and moved after it: the loss is unbiased, save for a prompt's very first
    batch.

    The map follows the velocity by self-distillation from the same points.

    Args:
        gradient: whether to use the reward's gradient.
        draws: posterior samples for each x_t. More of them lower the variance, and each costs
            `steps` calls of the base (and as many gradients in x, with `gradient`).
        steps: denoiser calls per posterior sample, see `glass`.
        policy: whose jumps x_t is made of. With the student's, x_t follows the tuned model, and
            the weights are even for a strong tilt; all posterior samples are then made by `glass`.
        max_log_w: the largest log w, a bias towards the base; None: unbounded.
        distil: weight of the self-distillation; 0 tunes no jumps.
        step: shortest and longest Heun step of it.
        ends: smallest distance of t from 0 and from 1.

    Raises:
        ValueError: an option out of its range; the message says what it may be.
    """

    per_call = True  # the running estimates change with each call

    def __init__(
        self,
        gradient: bool = True,
        draws: int = 1,
        steps: int = 6,
        policy: Literal["base", "student"] = "base",
        max_log_w: float | None = None,
        distil: float = 1.0,
        step: tuple[float, float] = (0.03, 0.13),
        ends: float = 0.01,
    ) -> None:
        super().__init__()
        if draws < 1:
            raise ValueError(f"draws must be at least 1, got {draws}: one x_1 for each x_t")
        if steps < 2:
            raise ValueError(f"steps must be at least 2, got {steps}: 4 to 8 are accurate")
        if policy not in ("base", "student"):
            raise ValueError(f"policy must be 'base' or 'student', got {policy!r}")
        if max_log_w is not None and max_log_w <= 0:
            raise ValueError(
                f"max_log_w must be positive, got {max_log_w}: it bounds log w, which is near 0 "
                "at first; None leaves it unbounded"
            )
        if not 0 < ends < 0.5:
            raise ValueError(f"ends must be in (0, .5), got {ends}: t is uniform on [e, 1 - e]")
        penalties(distil=distil)
        self.gradient = self.differentiable = gradient
        self.draws, self.steps, self.policy, self.max_log_w = draws, steps, policy, max_log_w
        self.distil, self.step, self.ends = distil, tuple(step), ends
        unseen = torch.full((SLOTS,), torch.nan, dtype=torch.float64)
        self.register_buffer("log_z", unseen)
        self.log_z: Tensor

    def push(self, batch: Batch, x: Tensor, t: Tensor, own: Tensor | None) -> tuple[Tensor, ...]:
        """Return R and w of the samples, (n, draws), and the mean of `(σ²/2) ∇w`, (n, *event).

        Args:
            batch: the batch.
            x: states at t, (n, *event).
            t: (n,), in (0, 1).
            own: an exact sample of the posterior, if there is one that can be used.
        """
        n, event, m = len(x), x.shape[1:], self.draws
        kappa, half = tilt_gain(batch.base.path, t)
        count = m if own is None else m - 1
        drawn = x.new_empty(0)
        with torch.set_grad_enabled(self.differentiable):
            leaf = x.repeat_interleave(count, 0).requires_grad_(self.differentiable)
            if count:
                z = batch.draws.normal((count, *event)).flatten(0, 1)
                drawn = glass(batch.base, leaf, t.repeat_interleave(count), z, self.steps)
            if own is not None:
                others = drawn.reshape(n, count, *event) if count else x.new_empty(n, 0, *event)
                drawn = torch.cat([own[:, None], others], 1).flatten(0, 1)
            value = batch.score(drawn)
        r = value.detach().reshape(n, m)
        w = self.weigh(batch, r)
        if self.differentiable:
            (gradient,) = torch.autograd.grad(value.sum(), leaf)
            each = gradient * like(w.flatten(), gradient)
            return r, w, like(half, x) * each.reshape(n, m, *event).mean(1)
        with torch.no_grad():
            gap = drawn - batch.base.denoise(x, t).repeat_interleave(m, 0)
        each = gap * like(w.flatten() - 1, gap)
        return r, w, like(kappa, x) * each.reshape(n, m, *event).mean(1)

    def weigh(self, batch: Batch, r: Tensor) -> Tensor:
        """Return `w = exp(R - c)`, (n, draws), and then update the running estimates."""
        texts = [""] if batch.prompts is None else batch.prompts
        slots = onto(torch.tensor([slot(text) for text in texts]), self.log_z.device)
        n, m = r.shape
        rows = r.to(self.log_z.device).double().reshape(len(slots), -1)
        now = rows.logsumexp(1) - math.log(rows.shape[1])
        known = self.log_z[slots]
        known = torch.where(known.isnan(), now, known)
        running = known.repeat_interleave(n // len(slots)).to(r)
        own = torch.eye(m, dtype=torch.bool, device=r.device)
        others = torch.where(own, running[:, None, None], r[:, None, :])  # (n, draw, the others)
        log_w = r - (others.logsumexp(2) - math.log(m))
        self.log_z[slots] = torch.logaddexp(known + math.log(0.95), now + math.log(0.05))
        return (log_w if self.max_log_w is None else log_w.clamp(max=self.max_log_w)).exp()

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return {"loss", "reward", "tilt", "off", "ess"}.

        "reward" is that of the posterior samples, which follow the law of the points: with the
        base's points, the base's. "ess" is the effective share of the weights, at most 1.
        """
        source = batch.base if self.policy == "base" else batch.student
        z, x_0 = batch.noise(), batch.noise()
        t = self.ends + (1 - 2 * self.ends) * batch.draws.uniform()
        with torch.no_grad():
            x_1 = source.jump(z, 0.0, 1.0)
            x = source.path.interpolate(x_0, x_1, t)
            b = batch.base.velocity(x, t)
        exact = self.policy == "base" and not self.differentiable
        r, w, push = self.push(batch, x, t, x_1 if exact else None)
        v = batch.student.velocity(x, t)
        goal = b + push - like(w.mean(1) - 1, b) * (v.detach() - b)
        tilt = squared(v - goal).mean() / x[0].numel()
        total, out = tilt, {"tilt": tilt.detach()}
        if self.distil:
            off = distil(batch, lambda s: source.path.interpolate(x_0, x_1, s), *self.step)
            total, out["off"] = tilt + self.distil * off, off.detach()
        out["ess"] = w.mean().square() / w.square().mean()
        return {"loss": total, "reward": r.mean() * batch.temperature, **out}
