"""The derivative of a map's mean velocity along its path, a term of the MeanFlow identity."""

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from steer.flow import FlowMap
from steer.path import like

__all__ = ["derivative"]


def derivative(
    flow: FlowMap, x: Tensor, s: Tensor, t: Tensor, v: Tensor, step: float = 0.01
) -> Tensor:
    """Return `d = ∂_s u + ∇u·v` of the mean velocity `u = (X(s,t,x) - x) / (t-s)`, (n, *event).

    With `X(s,t,x) = x + (t-s) u(x,s,t)`, the Eulerian equation `∂_s X + ∇X·b_s = 0` reads

        b - u + (t-s) (∂_s u + ∇u·b) = 0,   so   b = u - (t-s) d   at v = b_s(x):

    the MeanFlow identity (Geng et al. 2025, arXiv 2505.13447) with noise at t = 0, where the start
    of the interval moves. For weights in float32 or better, d is a finite difference along
    `x + h v` at `s + h`: central, and one-sided within a step of s = 0. With less precise weights
    rounding would dominate such a difference. Then d is the directional derivative by forward-mode
    automatic differentiation, which is as exact as the velocity. If a layer does not support
    forward mode, d is a difference with a quarter of the step and the same weights in float32.

    Args:
        flow: a flow map.
        x: points at s, (n, *event).
        s: starts, (n,).
        t: ends, (n,), at least two steps after s.
        v: the direction, (n, *event).
        step: half the span of the difference, in time.
    """
    with torch.autocast(x.device.type, enabled=False), torch.compiler.set_stance("force_eager"):
        if not _coarse(flow):
            return _difference(flow, x, s, t, v, step)
        try:
            return _directional(flow, x, s, t, v)
        except (NotImplementedError, RuntimeError) as error:
            if "forward" not in str(error).lower() and "jvp" not in str(error).lower():
                raise
            return _difference(_Single(flow), x, s, t, v, step / 4)


def _coarse(flow: nn.Module) -> bool:
    """Return whether any weights have less precision than float32."""
    least = torch.finfo(torch.float32).eps
    kinds = {p.dtype for p in flow.parameters() if p.is_floating_point()}
    return any(torch.finfo(kind).eps > least for kind in kinds)


def _mean_velocity(flow: nn.Module, x: Tensor, s: Tensor, t: Tensor) -> Tensor:
    return (flow.jump(x, s, t) - x) / like(t - s, x)  # type: ignore[operator]


def _difference(
    flow: nn.Module, x: Tensor, s: Tensor, t: Tensor, v: Tensor, step: float
) -> Tensor:
    def u(at: Tensor) -> Tensor:
        y = x + like(at - s, x) * v
        return (flow.jump(y, at, t) - y) / like(t - at, x)  # type: ignore[operator]

    low, high = (s - step).clamp(min=0), s + step
    return (u(high) - u(low)) / like(high - low, x)


def _directional(flow: FlowMap, x: Tensor, s: Tensor, t: Tensor, v: Tensor) -> Tensor:
    """Return the derivative along (v, 1); attention is written out, as its kernels have none."""
    with torch.no_grad(), forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
        along = forward_ad.make_dual(x, v), forward_ad.make_dual(s, torch.ones_like(s))
        u = _mean_velocity(flow, *along, t)
        return forward_ad.unpack_dual(u).tangent


class _Single(nn.Module):
    """A flow whose weights are converted to float32 during a jump."""

    def __init__(self, flow: FlowMap) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, x: Tensor, s: Tensor, t: Tensor) -> Tensor:
        return self.flow.jump(x, s, t)

    def jump(self, x: Tensor, s: Tensor, t: Tensor) -> Tensor:
        """Return the flow's jump."""
        named = [*self.named_parameters(), *self.named_buffers()]
        wide = {n: p.float() for n, p in named if p.is_floating_point()}
        return functional_call(self, wide, (x, s, t))
