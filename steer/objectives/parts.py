"""Terms of the losses of reward tuning: penalties that keep a flow near its base, and consistency.

A penalty has a weight of at least 0, and is a cost in the units of `R`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from steer.flow import FlowMap
from steer.noise import Draws
from steer.objectives.batch import Batch
from steer.objectives.regression import lagrangian_target
from steer.path import Time, like

__all__ = [
    "action",
    "consistency",
    "distil",
    "draw_pair_of",
    "noise_displacement",
    "penalties",
    "self_distillation",
    "squared",
]


def penalties(**weights: float) -> None:
    """Refuse weights of penalties that are negative.

    Raises:
        ValueError: one of them is; the message names it.
    """
    for name, weight in weights.items():
        if not weight >= 0:
            raise ValueError(
                f"{name} must not be negative, got {weight}: it is the weight of a penalty, and 0 "
                "leaves it out"
            )


def squared(x: Tensor) -> Tensor:
    """Return `|x|²` of each row, (n,), summed over the event."""
    x = x if x.dtype == torch.float64 else x.float()
    return x.square().flatten(1).sum(1)


def action(
    student: FlowMap, base: FlowMap, x: Tensor, s: Time, t: Time, y: Tensor | None = None
) -> Tensor:
    """Return the control energy of a jump, `(t-s)/2 |v_θ(x,s,t) - v_b(x,s,t)|²`, (n,).

    Summed over the jumps from 0 to 1 it is the action `½ ∫ |u|² dt` that theory (46) weighs
    against the reward; at s = 0, t = 1 it is `½ |X_θ(0,1,x) - X_b(0,1,x)|²`.

    Args:
        student: the tuned flow.
        base: the flow that it is kept near.
        x: points at s, (n, *event).
        s: start.
        t: end.
        y: the student's jump of x, where it is known.
    """
    y = student.jump(x, s, t) if y is None else y
    gap = torch.as_tensor(t, device=x.device) - torch.as_tensor(s, device=x.device)
    return squared(y - base.jump(x, s, t)) / (2 * gap.clamp(min=1e-3))


def noise_displacement(base: FlowMap, y: Tensor, steps: int = 4) -> Tensor:
    """Return the noise that the base's probability flow maps to y, (n, *event).

    Midpoint steps of `dx/dt = b_t(x)` from t = 1 back to 0. Tilts of pictures are tilts of their
    noise, so a distance there is in units of the noise's own standard deviation (HyperNoise,
    Eyring et al. 2025, arXiv 2508.09968, penalises it).
    """
    h = 1 / steps
    for k in range(steps):
        t = 1 - k * h
        middle = y - h / 2 * base.velocity(y, t)
        y = y - h * base.velocity(middle, t - h / 2)
    return y


def consistency(student: FlowMap, x: Tensor, s: Tensor, u: Tensor, t: Tensor) -> Tensor:
    """Return `|X(s,t,x) - X(u,t,X(s,u,x))|² / (t-s)²`, theory (7), averaged over the event, (n,).

    Gradients flow to both sides: a change that the reward made to one jump is transferred to the
    jumps that compose it, down to the velocity, and vice versa.
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

    `|X_θ(s,t,x) - X*_θ - (X_b(s,t,x) - X*_b)|² / (t-s)²`, with X* the map at t - h continued by
    one Heun step of the flow's own velocity, theory (13), without gradient. For a base that is a
    true map this is self-distillation (Boffi et al. 2025, arXiv 2505.18825), theory (14) with the
    student as its own teacher. The jumps and the velocity of a learned base differ. This
    difference is subtracted, so that the loss is zero at step 0, and only the change made by
    tuning is distilled.

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
    """Sample pairs (s, t) and steps for the rows; return the mean self-distillation loss, ().

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
    """Sample pairs s < t, (n,): a fraction `ends` has s = 0, as many t = 1, others are uniform."""
    pair = draws.uniform((2,)).sort(1).values
    s, t = pair.unbind(1)
    s = torch.where(draws.uniform() < ends, 0.0, s)
    return s, torch.where(draws.uniform() < ends, 1.0, t)
