"""Draws of the clean posterior `p(x_1 | x_t = x)` of a flow, from its denoiser alone."""

import math

import torch
from torch import Tensor

from steer.flow import FlowMap
from steer.path import Path, Time, as_time, like

__all__ = ["glass", "time_at"]


def time_at(path: Path, angle: Tensor) -> Tensor:
    """Return the t with `atan2(beta_t, alpha_t) = angle`, by bisection, of the shape of angle."""
    low, high = torch.zeros_like(angle), torch.ones_like(angle)
    for _ in range(48):
        middle = (low + high) / 2
        alpha, beta = path(middle)
        below = torch.atan2(beta, alpha) < angle
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return high


def glass(flow: FlowMap, x: Tensor, t: Time, noise: Tensor, steps: int = 6) -> Tensor:
    """Draw `x_1` from `p(x_1 | x_t = x)` with the denoiser alone, (n, *event).

    An inner flow carries noise z to `x_1 - m`, along `U = c cos(φ) z + sin(φ) (x_1 - m)`, φ from
    0 to π/2, with `m = D_t(x)` and `c = α/r`, `r² = α² + β²`: the posterior's deviation, were the
    data N(0, I). `x_t` and U are two independent Gaussian views of `x_1`, so their precisions
    add, to `p = (β_t/α_t)² + tan²(φ)/c²`, and together they are one view:

        E[x_1 | x_t, U] = D_t*(β_t* S),   (β/α)²(t*) = p,
        S = (cos² β x / r² + sin² m + sin U) / (cos² β² / r² + sin²)

    The inner flow is `d(U / cos φ) = (E[x_1 | x_t, U] - m) d tan φ`. It is solved with the mean
    linear in sin φ over a step, predicted from the step before and then corrected: second order,
    finite at both ends, and exact where the data are N(0, I). Differentiable in x and noise. Few
    steps draw too little of the spread in directions in which the data are far narrower than 1:
    at deviation .1, six steps at t = .5 give 28 % of the variance, 32 steps 93 %.

    GLASS flows, from the denoiser to transitions without training (2025, arXiv 2509.25170); the
    centre, the scale and the solver are ours.

    Args:
        flow: its path and its denoiser; at t = 1 the draw is x itself.
        x: states at t, (n, *event).
        t: a time, or one a row.
        noise: standard normals, (n, *event).
        steps: calls of the denoiser, at least 2.

    Raises:
        ValueError: fewer than two steps.
    """
    if steps < 2:
        raise ValueError(f"steps must be at least 2, got {steps}: the first finds the mean alone")
    t = as_time(t)
    alpha, beta = flow.path(t)
    r = torch.hypot(alpha, beta)
    share, scale = like(beta / r**2, x), like(alpha / r, x)
    grid = [math.pi / 2 * k / steps for k in range(steps + 1)]
    precision = [(math.cos(f) * beta / r) ** 2 + math.sin(f) ** 2 for f in grid[1:-1]]
    # tan of the angle of t* is sqrt(p); everything is multiplied by c cos(φ), which may be 0
    angles = [
        torch.atan2(p.sqrt(), math.cos(f) * alpha / r)
        for p, f in zip(precision, grid[1:-1], strict=True)
    ]
    inner = time_at(flow.path, torch.stack(angles))

    def carry(u: Tensor, mean: Tensor, slope: Tensor, f: float, g: float) -> Tensor:
        """Carry U from angle f to g, its mean linear in the sine."""
        ratio = math.cos(g) / math.cos(f) if g < math.pi / 2 else 0.0
        gain = math.sin(g) - ratio * math.sin(f)
        return ratio * u + gain * mean + (1 - ratio - math.sin(f) * gain) * slope

    m = flow.denoise(x, t)
    start, mean = scale * noise, torch.zeros_like(x)
    u = carry(start, mean, start, grid[0], grid[1])  # as for data N(0, I)
    for k in range(1, steps):
        f = grid[k]
        view = math.cos(f) ** 2 * share * x + math.sin(f) ** 2 * m + math.sin(f) * u
        gain = flow.path(inner[k - 1])[1] / precision[k - 1]
        new = flow.denoise(like(gain, x) * view, inner[k - 1]) - m
        slope = (new - mean) / (math.sin(f) - math.sin(grid[k - 1]))
        start = carry(start, mean, slope, grid[k - 1], f)
        mean = new
        u = carry(start, mean, slope, f, grid[k + 1])
    return m + u
