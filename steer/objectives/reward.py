"""What the objectives of reward tuning share: their batch, their brakes, and their names.

An objective is called with a `Batch` and returns a loss and what is worth logging. In `R` the
reward is divided by the temperature, so a batch says how hard it is tuned.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from steer.flow import FlowMap, flat_prompts
from steer.noise import Draws
from steer.objectives.consistency import lagrangian_target
from steer.path import Time, like
from steer.reward import Reward, name_of, score

__all__ = [
    "Batch",
    "Objective",
    "action",
    "consistency",
    "distil",
    "draw_pair_of",
    "noise_displacement",
    "self_distillation",
    "squared",
]


def squared(x: Tensor) -> Tensor:
    """Return `|x|²` of each row, (n,), summed over the event."""
    x = x if x.dtype == torch.float64 else x.float()
    return x.square().flatten(1).sum(1)


@dataclass(frozen=True)
class Batch:
    """One micro-batch: the flows with its prompts bound, the reward, and its rows' randomness.

    Rows are prompt-major: row i belongs to prompt `i // group`.

    Attributes:
        student: the flow that is tuned, with gradients to its adapters.
        base: the same without adapters.
        average: the same with the running average of the adapters.
        reward: the reward, in its own units.
        temperature: what it is divided by.
        draws: normals and uniforms for the rows.
        prompts: p prompts, or None.
        asked: what the reward is asked, p texts, where that differs.
        unbound: the base without prompts, where an objective samples by itself.
        epochs: how often each of these prompts has been seen before, p numbers.
    """

    student: FlowMap
    base: FlowMap
    average: FlowMap
    reward: Reward
    temperature: float
    draws: Draws
    prompts: Sequence[str] | None = None
    asked: Sequence[str] | None = None
    unbound: FlowMap | None = None
    epochs: Sequence[int] | None = None

    def __len__(self) -> int:
        return len(self.draws)

    @property
    def group(self) -> int:
        """Rows of each prompt."""
        return len(self) // (1 if self.prompts is None else len(self.prompts))

    def noise(self) -> Tensor:
        """Draw `x_0` for all rows, (n, *event)."""
        return self.draws.normal(self.student.event_shape)

    def zeros(self) -> Tensor:
        """Return a zero for each row, (n,): the time of noise."""
        return torch.zeros(len(self), dtype=self.draws.dtype, device=self.draws.device)

    def score(self, x: Tensor) -> Tensor:
        """Return `R(x_1) = reward(decode(x_1)) / temperature`, (n,), in float32.

        Rows may be a multiple of the batch's, prompt-major as they are.

        Raises:
            FloatingPointError: a reward that is not finite.
            ValueError: a reward without the gradient that it declares.
        """
        asked = self.prompts if self.asked is None else self.asked
        texts = None if asked is None else flat_prompts(asked, len(x))
        with torch.autocast(x.device.type, enabled=False):  # decode and reward in full precision
            x = x if x.dtype == torch.float64 else x.float()
            values = score(self.reward, self.student.decode(x), texts)
        asked_gradient = torch.is_grad_enabled() and x.requires_grad
        if asked_gradient and self.reward.differentiable and not values.requires_grad:
            raise ValueError(
                f"reward {name_of(self.reward)!r} says that it is differentiable, and its scores "
                "carry no gradient to the images: keep to tensor operations (no PIL, numpy, "
                "detach or no_grad), or declare it with rewards.wrap(f, differentiable=False) and "
                "take an objective that needs none, nft or grpo"
            )
        finite = torch.isfinite(values)
        if not bool(finite.all()):
            row = int((~finite).nonzero()[0])
            whose = "" if texts is None else f" of prompt {texts[row]!r}"
            raise FloatingPointError(
                f"the reward is {float(values[row].detach())} in row {row}{whose}: a reward must "
                "be finite on every picture that the model can draw; look at the reward, or at "
                "the run's last sheet for what it was asked about"
            )
        return (values if values.dtype == torch.float64 else values.float()) / self.temperature


class Objective(nn.Module):
    """A rule by which a reward moves the adapters: `objective(batch) -> {"loss", ...}`.

    A subclass says whether it needs the reward's gradient, and how many rows of one prompt it
    wants side by side. What it remembers between steps are buffers: checkpoints keep them.

    Attributes:
        differentiable: whether it needs the reward's gradient.
        group: rows of each prompt in a batch.
    """

    differentiable: bool = True
    group: int = 1

    @abstractmethod
    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the loss, (), and other numbers by name."""


# ------------------------------------------------------------------ brakes, as parts


def action(
    student: FlowMap, base: FlowMap, x: Tensor, s: Time, t: Time, y: Tensor | None = None
) -> Tensor:
    """Return the control energy of a jump, `(t-s)/2 |v_θ(x,s,t) - v_b(x,s,t)|²`, (n,).

    Summed over the jumps from 0 to 1 it is the action `½ ∫ |u|² dt` that theory (46) weighs
    against the reward; at s = 0, t = 1 it is `½ |X_θ(0,1,x) - X_b(0,1,x)|²`.

    Args:
        student: the tuned flow.
        base: the flow that it is held to.
        x: points at s, (n, *event).
        s: start.
        t: end.
        y: the student's jump of x, where it is known.
    """
    y = student.jump(x, s, t) if y is None else y
    gap = torch.as_tensor(t, device=x.device) - torch.as_tensor(s, device=x.device)
    return squared(y - base.jump(x, s, t)) / (2 * gap.clamp(min=1e-3))


def noise_displacement(base: FlowMap, y: Tensor, steps: int = 4) -> Tensor:
    """Return the noise that the base's probability flow leads to y, (n, *event).

    Midpoint steps of `dx/dt = b_t(x)` from t = 1 back to 0. Tilts of pictures are tilts of their
    noise, so a distance there is one in units of the noise's own deviation (HyperNoise, Eyring et
    al. 2025, arXiv 2508.09968, penalises it).
    """
    h = 1 / steps
    for k in range(steps):
        t = 1 - k * h
        middle = y - h / 2 * base.velocity(y, t)
        y = y - h * base.velocity(middle, t - h / 2)
    return y


def consistency(student: FlowMap, x: Tensor, s: Tensor, u: Tensor, t: Tensor) -> Tensor:
    """Return `|X(s,t,x) - X(u,t,X(s,u,x))|² / (t-s)²`, theory (7), averaged over the event, (n,).

    No side is held fixed: what the reward did to one jump moves to the jumps that compose it, down
    to the velocity, and back.
    """
    straight = student.jump(x, s, t)
    composed = student.jump(student.jump(x, s, u), u, t)
    gap = like((t - s).clamp(min=1e-2), x)
    return squared((straight - composed) / gap) / x[0].numel()


def self_distillation(
    student: FlowMap,
    base: FlowMap,
    x: Tensor,
    pair: tuple[Tensor, Tensor],
    h: Tensor,
) -> Tensor:
    """Return theory (63), averaged over the event, (n,): the map follows its own velocity.

    `|X_θ(s,t,x) - X*_θ - (X_b(s,t,x) - X*_b)|² / (t-s)²`, with X* the map at t - h carried on by
    one Heun step of the flow's own velocity, theory (13), without gradient. Of a base that is a
    true map this is self-distillation (Boffi et al. 2025, arXiv 2505.18825), theory (14) with the
    student as its own teacher. A learned base is not: its jumps and its velocity differ, and that
    difference is left as it is, so that at step 0 nothing moves, and later only what was learned.

    Args:
        student: the tuned flow.
        base: the flow without adapters.
        x: points at s, (n, *event).
        pair: s and t, (n,) each.
        h: Heun steps, (n,).
    """
    s, t = pair
    with torch.no_grad():
        goal = lagrangian_target(student, student.velocity, x, s, t, h)
        goal += base.jump(x, s, t) - lagrangian_target(base, base.velocity, x, s, t, h)
    gap = like((t - s).clamp(min=1e-3), x)
    return squared((student.jump(x, s, t) - goal) / gap) / x[0].numel()


def distil(batch: Batch, x: Callable[[Tensor], Tensor], low: float, high: float) -> Tensor:
    """Draw pairs (s, t) and steps for the rows, and return their mean self-distillation, ().

    Args:
        batch: the batch.
        x: s (n,) -> points at s, (n, *event).
        low: the shortest Heun step.
        high: the longest.
    """
    s, t = draw_pair_of(batch.draws)
    h = low + (high - low) * batch.draws.uniform()
    with torch.no_grad():
        at = x(s)
    return self_distillation(batch.student, batch.base, at, (s, t), h).mean()


def draw_pair_of(draws: Draws, ends: float = 0.35) -> tuple[Tensor, Tensor]:
    """Draw pairs s < t as `consistency.draw_pair` does, from the rows' own randomness."""
    pair = draws.uniform((2,)).sort(1).values
    s, t = pair.unbind(1)
    s = torch.where(draws.uniform() < ends, 0.0, s)
    return s, torch.where(draws.uniform() < ends, 1.0, t)
