"""Regression losses for a velocity, and for the flow map of a velocity.

A velocity is fitted by flow matching (Lipman et al. 2023, arXiv 2210.02747). A map by the
Lagrangian rule `∂_t X(s,t,x) = b_t(X(s,t,x))` (Boffi et al. 2024, 2406.07507) in discrete form:
the map at t is the map at t - h continued by one Heun step of the velocity. No derivative of the
network is taken, so high time frequencies cannot make the rule diverge. Derived in docs/theory.md.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from steer.flow import FlowMap
from steer.path import like

__all__ = [
    "Velocity",
    "lagrangian_error",
    "lagrangian_loss",
    "lagrangian_target",
    "mean_square",
    "velocity_loss",
]

Velocity = Callable[[Tensor, Tensor], Tensor]
"""`(x, t) -> b_t(x)`, times (n,)."""


def mean_square(error: Tensor) -> Tensor:
    """Return the mean square over the event, (n,), in float32."""
    return error.float().square().flatten(1).mean(1)


def velocity_loss(flow: FlowMap, x_0: Tensor, x_1: Tensor, t: Tensor) -> Tensor:
    """Return `|b_t(x_t) - (alpha' x_0 + beta' x_1)|²`, theory (11), averaged over the event, (n,).

    Args:
        flow: its path and its velocity.
        x_0: noise (n, *event).
        x_1: data (n, *event).
        t: times (n,).
    """
    alpha_dot, beta_dot = flow.path.derivative(t)
    b = flow.velocity(flow.path.interpolate(x_0, x_1, t), t)
    # term by term, not by `slope`, so that earlier runs resume bit for bit
    return mean_square(b - like(alpha_dot, x_0) * x_0 - like(beta_dot, x_1) * x_1)


def lagrangian_target(
    flow: FlowMap, velocity: Velocity, x: Tensor, s: Tensor, t: Tensor, h: Tensor
) -> Tensor:
    """Continue `X(s,t-h,x)` to t by one Heun step of the velocity, theory (13), (n, *event).

    Args:
        flow: the map that is used at t - h (a running average of the trained one).
        velocity: `(x, t) -> b_t(x)`, times (n,).
        x: points at s.
        s: start, (n,).
        t: end, (n,).
        h: step, (n,), cut at t - s: there the target is a plain Heun step from x.
    """
    h = torch.minimum(h, t - s)
    y = flow.jump(x, s, t - h)
    b = velocity(y, t - h)
    return y + like(h / 2, x) * (b + velocity(y + like(h, x) * b, t))


def lagrangian_error(
    flow: FlowMap,
    target: FlowMap,
    velocity: Velocity,
    x: Tensor,
    pair: tuple[Tensor, Tensor],
    h: Tensor,
) -> Tensor:
    """Return `(X(s,t,x) - X*) / (t-s)`, theory (14), (n, *event).

    `X*` is `lagrangian_target` of `target`, without gradient. At the true map it is O(h^3), Heun's
    local error, over t-s.
    """
    s, t = pair
    with torch.no_grad():
        goal = lagrangian_target(target, velocity, x, s, t, h)
    gap = like((t - s).clamp(min=1e-3), x)
    return (flow.jump(x, s, t) - goal) / gap


def lagrangian_loss(
    flow: FlowMap,
    target: FlowMap,
    velocity: Velocity,
    x: Tensor,
    pair: tuple[Tensor, Tensor],
    h: Tensor,
) -> Tensor:
    """Return the mean square of `lagrangian_error` over the event, (n,)."""
    return mean_square(lagrangian_error(flow, target, velocity, x, pair, h))
