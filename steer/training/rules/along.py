"""The derivative of a map's mean velocity along a direction in (x, s, t), in two ways.

`torch.func.jvp` is exact and costs about one more evaluation. It needs forward-mode formulas of
every layer: attention is written out (its fused kernels have none), autocast is off (it breaks the
formulas of convolutions) and memory is contiguous (GroupNorm's fails in channels_last). A central
difference costs two evaluations, and works with any layer, with checkpointing and with compiled
or wrapped networks; in bfloat16 it is dominated by rounding.
"""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from steer.flow import FlowMap
from steer.path import like

__all__ = ["How", "along", "differentiable_forward"]

How = Literal["auto", "jvp", "difference"]

Direction = tuple[Tensor | None, float, float]
"""(dx or None for zero, ds, dt)."""

STEP = 0.005
"""Half the span of the difference, in time (AnyFlow's)."""


def along(
    flow: FlowMap,
    x: Tensor,
    s: Tensor,
    t: Tensor,
    direction: Direction,
    how: How = "jvp",
    step: float = STEP,
) -> tuple[Tensor, Tensor]:
    """Return `v(x,s,t)` and its derivative along (dx, ds, dt), both (n, *event).

    Gradients to the parameters pass through both.

    Args:
        flow: the flow whose `mean_velocity` is used, prompts bound.
        x: points at s.
        s: starts, (n,).
        t: ends, (n,).
        direction: (dx, ds, dt).
        how: "jvp" or "difference"; "auto" lets `differentiable_forward` decide.
        step: half the span of the difference. Near the ends, where s or t would leave [0, 1] or
            pass the other, the difference is one-sided.
    """
    dx, ds, dt = direction
    dx = torch.zeros_like(x) if dx is None else dx
    if how == "difference":
        return _difference(flow, x, s, t, (dx, ds, dt), step)
    tangents = dx.contiguous(), torch.full_like(s, ds), torch.full_like(t, dt)
    with torch.autocast(x.device.type, enabled=False), sdpa_kernel(SDPBackend.MATH):
        found: Any = jvp(flow.mean_velocity, (x.contiguous(), s, t), tangents)
    return found[0], found[1]


def _difference(
    flow: FlowMap, x: Tensor, s: Tensor, t: Tensor, direction: tuple[Tensor, float, float],
    step: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dx, ds, dt = direction
    low, high = torch.full_like(s, -step), torch.full_like(s, step)
    if ds:
        low, high = torch.maximum(low, -s / ds), torch.minimum(high, (t - s) / ds)
    if dt:
        low, high = torch.maximum(low, (s - t) / dt), torch.minimum(high, (1 - t) / dt)

    def at(by: Tensor) -> Tensor:
        return flow.mean_velocity(x + like(by, x) * dx, s + by * ds, t + by * dt)

    span = (high - low).clamp(min=1e-6)
    return flow.mean_velocity(x, s, t), (at(high) - at(low)) / like(span, x)


def differentiable_forward(flow: FlowMap, x: Tensor, s: Tensor, t: Tensor) -> How:
    """Return "jvp" where all layers of the flow have forward-mode formulas, else "difference".

    This is tried without gradient. If the flow fails for another reason, the difference fails as
    well.

    Args:
        flow: prompts of all rows bound.
        x: points, (n, *event).
        s: starts, (n,).
        t: ends, (n,).
    """
    try:
        with torch.no_grad():
            along(flow, x, s, t, (x, 1.0, 0.0), "jvp")
    except (NotImplementedError, RuntimeError) as error:
        if "out of memory" in str(error).lower():
            raise
        return "difference"
    return "jvp"
