"""Samples of the clean posterior `p(x_1 | x_t = x)`: by a trained map, or from the flow only.

`PosteriorMap`, `Glass` and `WeightedRenoise` have one method, `sample(x, t, n, generator)`: its
arguments and shape are those of `GaussianMixture.posterior_sample`.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Self

import torch
from torch import Generator, Tensor, nn

from steer.flow import FlowMap, log_dtype
from steer.onto import onto
from steer.path import Path, Time, as_time, like, step_times
from steer.ranges import above, count

__all__ = ["Glass", "PosteriorMap", "WeightedRenoise", "glass", "glass_velocity", "time_at"]


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
    """Sample `x_1` from `p(x_1 | x_t = x)` using only the denoiser, (n, *event).

    An inner flow carries noise z to `x_1 - m`, along `U = c cos(φ) z + sin(φ) (x_1 - m)`, φ from 0
    to π/2, with `m = D_t(x)` and `c = α/r`, `r² = α² + β²`, the posterior's standard deviation for
    N(0, I) data. `x_t` and U are two independent Gaussian observations of `x_1`, so their
    precisions add up to `p = (β_t/α_t)² + tan²(φ)/c²`, and together they are one observation:

        E[x_1 | x_t, U] = D_t*(β_t* S),   (β/α)²(t*) = p,
        S = (cos² β x / r² + sin² m + sin U) / (cos² β² / r² + sin²)

    The inner flow is `d(U / cos φ) = (E[x_1 | x_t, U] - m) d tan φ`. It is solved with the mean
    linear in sin φ over a step, predicted from the step before and then corrected: second order,
    finite at both ends, and exact for N(0, I) data. Differentiable in x and noise. With few steps
    the variance is too small in directions in which the standard deviation of the data is much
    smaller than 1: at .1, six steps at t = .5 give 28 % of the variance, 32 steps 93 %.

    GLASS flows, from the denoiser to transitions without training (2025, arXiv 2509.25170); the
    centre, the scale and the solver are from this library.

    Args:
        flow: its path and its denoiser are used; at t = 1 the sample is x itself.
        x: states at t, (n, *event).
        t: a time, or one per row.
        noise: standard normals, (n, *event).
        steps: calls of the denoiser, at least 2.

    Raises:
        ValueError: fewer than two steps.
    """
    count("steps", steps, 2)  # the first only computes the mean
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
        """Integrate U from angle f to g, with the mean linear in the sine."""
        ratio = math.cos(g) / math.cos(f) if g < math.pi / 2 else 0.0
        gain = math.sin(g) - ratio * math.sin(f)
        return ratio * u + gain * mean + (1 - ratio - math.sin(f) * gain) * slope

    m = flow.denoise(x, t)
    start, mean = scale * noise, torch.zeros_like(x)
    u = carry(start, mean, start, grid[0], grid[1])  # as for N(0, I) data
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


def glass_velocity(flow: FlowMap, u: Tensor, r: Time, x: Tensor, t: Time) -> Tensor:
    """Return the velocity of the flow from N(0, I) to `p(x_1 | x_t = x)`, (n, *event).

    The inner state is `u = (1-r) z + r x_1`, with independent z. `x_t` and u are two independent
    Gaussian observations of x_1, whose precisions add up to one observation at a later time t*:

        b_r(u | x, t) = E[x_1 - z | u, x_t] = (D_t*(β_t* S) - u) / (1 - r)
        (β/α)²(t*) = p = (β_t/α_t)² + (r/(1-r))²,   S = ((β_t/α_t²) x + (r/(1-r)²) u) / p

    Exact for the flow's own denoiser, which is called once, on any path. At r = 1, where u is x_1,
    it is u. u and x are (n, *event), the times in [0, 1] floats or tensors () or (n,), else a
    ValueError; no gradient reaches the times. GLASS flows (2025, arXiv 2509.25170).
    """
    r, t = _fitting(x, u, r, t)
    end = r == 1
    r = torch.where(end, 0.5, r)  # rows at the end are replaced below
    alpha, beta = flow.path(t)
    # p times (α (1-r))², which may be 0: then D_0 is the data's mean at any state
    by_u, by_x, rest = r * alpha, (1 - r) * beta, (1 - r) * alpha
    root, angle = torch.hypot(by_u, by_x), torch.atan2(by_u, by_x)
    later = time_at(flow.path, torch.atan2(root, rest))
    scale = torch.hypot(*flow.path(later)) / torch.hypot(root, rest)
    view = like(scale * (1 - r) * angle.cos(), x) * x + like(scale * alpha * angle.sin(), u) * u
    b = (flow.denoise(view, later) - u) / like(1 - r, u)
    return torch.where(_picks(end, u), u, b)


def _fitting(x: Tensor, u: Tensor, *times: Time) -> list[Tensor]:
    """Return times as tensors () or (n,), or raise an error if one does not fit x or u."""
    if x.ndim < 2 or u.shape != x.shape:
        shapes = f"{tuple(x.shape)}, inner states of {tuple(u.shape)}"
        raise ValueError(f"states x of shape {shapes}: give (n, *event), one inner state a row")
    found = [as_time(t) for t in times]
    for t in found:
        if t.shape not in {(), x.shape[:1]}:
            what = f"a time of shape {tuple(t.shape)} does not fit {len(x)} rows"
            raise ValueError(f"{what}: give a float, a scalar tensor or one time per row")
    return found


def _picks(where: Tensor, x: Tensor) -> Tensor:
    """Shape a mask () or (n,) so that it selects rows of x."""
    return where.to(x.device).reshape(-1, *[1] * (x.ndim - 1))


def _copies(
    x: Tensor, t: Time, n: int, generator: Generator | None, noise: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Repeat m rows n times each, (m n, *event), in the order of x, with times and noise."""
    (time,) = _fitting(x, x, t)
    if not bool(((time >= 0) & (time <= 1)).all()):
        raise ValueError(f"t must be in [0, 1], got {time.tolist()}")
    rows = x.repeat_interleave(count("n", n), 0)
    if noise is not None:
        z = onto(noise, x.device).to(x).repeat(len(x), *[1] * (x.ndim - 1))
    else:
        z = onto(torch.randn(rows.shape, generator=generator, dtype=x.dtype), x.device)
    return rows, time.repeat_interleave(n, 0) if time.ndim else time, z


class PosteriorMap(nn.Module):
    """A posterior map `X(r,s,u; t,x)`: a jump 0 -> 1 from noise samples `p(x_1 | x_t = x)`.

    At each (x, t) there is an inner flow, on the linear path, from N(0, I) at inner time 0 to the
    posterior at 1, with the velocity of `glass_velocity`; this is its map, for all (x, t) at once:

        X(r,s,u; t,x) = u + (s-r) v(u, r, s, x, t),   x_1 = X(0,1,z; t,x),   z ~ N(0, I)

    The error of the network is a bias that weights do not correct; more jumps per sample may
    reduce it. Meta flow maps (2026, arXiv 2601.14430), posterior diamond maps (2602.05993);
    `steer.training`.

    Args:
        network: `network(u, r, s, x, t)` returns v, (n, *event), of states (n, *event) and times
            (n,), in the dtype of x and at least float32. If it has `given(prompts)`, which returns
            it with prompts bound, the map has it, too.
    """

    def __init__(self, network: Callable[..., Tensor]) -> None:
        super().__init__()
        self.network = network

    def mean_velocity(self, u: Tensor, r: Time, s: Time, x: Tensor, t: Time) -> Tensor:
        """Return v(u, r, s, x, t), (n, *event): on the diagonal, r = s, the inner velocity.

        Raises:
            ValueError: u, x, a time or what the network returns do not fit each other.
        """
        kind = torch.promote_types(u.dtype, torch.float32)
        r, s, t = (c.to(u.device, kind).expand(len(u)) for c in _fitting(x, u, r, s, t))
        v = self.network(u, r, s, x, t)
        if v.shape != u.shape:
            raise ValueError(f"the network returned {tuple(v.shape)}, not {tuple(u.shape)}")
        return v

    def jump(self, u: Tensor, r: Time, s: Time, x: Tensor, t: Time) -> Tensor:
        """Return `X(r,s,u; t,x) = u + (s-r) v(u, r, s, x, t)`, (n, *event)."""
        return u + like(as_time(s) - as_time(r), u) * self.mean_velocity(u, r, s, x, t)

    def given(self, prompts: Sequence[str]) -> Self:
        """Return the map with p prompts bound; itself, if its network takes none."""
        given = getattr(self.network, "given", None)
        return self if given is None else type(self)(given(prompts))

    def sample(
        self,
        x: Tensor,
        t: Time,
        n: int,
        generator: Generator | None = None,
        steps: int = 1,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Sample n times for each row of x, (n, *x.shape), with gradient to x and the network.

        Args:
            x: states at t, (m, *event).
            t: a float or a tensor () or (m,), in [0, 1]. At t = 1 a sample is x itself.
            n: samples per row; all n m rows are one network call.
            generator: a generator on the CPU.
            steps: jumps per sample, of equal length.
            noise: standard normals to start from, (n, *event), the same for all rows; instead of
                those of the generator, which differ between rows.

        Raises:
            ValueError: shapes that do not fit, a time outside [0, 1], a number below one.
        """
        rows, time, y = _copies(x, t, n, generator, noise)
        for r, s in pairwise(step_times(steps)):
            y = self.jump(y, r, s, rows, time)
        return torch.where(_picks(time == 1, rows), rows, y).unflatten(0, (-1, n)).transpose(0, 1)


class Glass:
    """Posterior samples of any flow by `glass`: no training, `steps` denoiser calls per sample.

    The error falls with the number of steps, at second order; see `glass` for the error of few
    steps.

    Args:
        flow: its path and its denoiser, prompts bound.
        steps: at least 2, else a ValueError.
    """

    def __init__(self, flow: FlowMap, steps: int = 16) -> None:
        self.flow, self.steps = flow, count("steps", steps, 2)

    def sample(
        self,
        x: Tensor,
        t: Time,
        n: int,
        generator: Generator | None = None,
        *,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Sample n times for each row of x, (n, *x.shape): as `PosteriorMap.sample`."""
        rows, time, z = _copies(x, t, n, generator, noise)
        return glass(self.flow, rows, time, z, self.steps).unflatten(0, (-1, n)).transpose(0, 1)


class WeightedRenoise:
    """Posterior samples of any flow map by weighted re-noising: no training, importance weights.

    From x at t back to the noisier t', whose signal-to-noise ratio `(β/α)²` is 1/f of that at t,
    and forward by the map:

        x' = k x + τ z,   k = β_t'/β_t,   τ² = α_t'² - k² α_t² = (1 - 1/f) α_t'²,   y = X(t',1,x')
        w  = ρ_t'(x') N(x; β_t y, α_t² I) / N(x'; k x, τ² I)

    For x' ~ ρ_t' the law of y is p; so y with these weights is a sample of p(y) N(x; β_t y, α_t²
    I), the posterior up to a constant. From a pool of n * candidates per row, n are selected with
    probabilities proportional to w. *Exact* for a true map of the velocity (3) as the pool grows.
    The means of a finite pool have an error of O(1/pool), and its samples are not independent.
    `log ρ_t'` is the flow's `log_prob`, or else Simpson's rule on the score from k x to x', theory
    (33), whose error does not fall with the pool. *Degenerate* in high dimension: for Gaussian
    data with a standard deviation far from α/β the effective size is at most .87^d of the pool at
    f = 3. Far below α/β, w has a finite variance for f > 2 only, and the fraction is `(sqrt(f
    (f-2)) / (f-1))^d`. A warning says how many rows have fewer than two effective candidates.
    Weighted diamond maps (2026, arXiv 2602.05993; trapezoids).

    Args:
        flow: its path, its map, and its density or score are used; prompts bound.
        factor: f, above 1, else a ValueError.
        candidates: candidates per sample; each costs a jump, and three scores if there is no
            density.
    """

    def __init__(self, flow: FlowMap, factor: float = 3.0, candidates: int = 32) -> None:
        above("factor - 1", factor - 1, ": it starts from a noisier time")
        self.flow, self.factor, self.candidates = flow, factor, count("candidates", candidates)

    @torch.no_grad()
    def propose(
        self,
        x: Tensor,
        t: Time,
        n: int,
        generator: Generator | None = None,
        *,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return n candidates y per row, (n, *x.shape), and log w, (n, m), up to constants.

        Weighted means of y have a smaller variance than means of selected samples. `noise`, (n,
        *event): the same normals for all rows, instead of the generator's.
        """
        rows, time, z = _copies(x, t, n, generator, noise)
        end, kind = time == 1, log_dtype(x.device)
        alpha, beta = self.flow.path(torch.where(end, 0.5, time))  # the end is replaced below
        spread = alpha * math.sqrt(self.factor)
        earlier = time_at(self.flow.path, torch.atan2(beta, spread))
        before = self.flow.path(earlier)[0]
        centre = like(before / spread, rows) * rows
        noisy = centre + like(before * math.sqrt(1 - 1 / self.factor), rows) * z
        y = self.flow.jump(noisy, earlier, 1.0)
        miss = (rows - like(beta, rows) * y) / like(alpha, rows)
        density = self.flow.log_prob(noisy, earlier)
        if density is None:  # up to that of the centre
            a, b, c = (self.flow.score(p, earlier) for p in (centre, (centre + noisy) / 2, noisy))
            density = ((noisy - centre) * (a + 4 * b + c) / 6).flatten(1).sum(1)
        square = (z.to(kind).square() - miss.to(kind).square()).flatten(1).sum(1)
        log_w = (density.to(kind) + square / 2).masked_fill(end.to(x.device), 0)
        y = torch.where(_picks(end, rows), rows, y)
        return y.unflatten(0, (-1, n)).transpose(0, 1), log_w.unflatten(0, (-1, n)).T

    def sample(self, x: Tensor, t: Time, n: int, generator: Generator) -> Tensor:
        """Sample n times for each row of x: as `PosteriorMap.sample`, no gradient."""
        parts = [self.propose(x, t, n, generator) for _ in range(self.candidates)]
        y, log_w = (torch.cat(part) for part in zip(*parts, strict=True))
        share = log_w.softmax(0).T.cpu()  # (m, pool)
        alone = int((share.square().sum(1) > 0.5).sum())
        if alone and len(y) > 1:
            few = f"{alone} of {len(x)} rows have fewer than 2 effective candidates of {len(y)}"
            warnings.warn(f"{few}: give more candidates, or take steer.Glass", stacklevel=2)
        pick = torch.multinomial(share, n, replacement=True, generator=generator)
        return y[pick.T.to(y.device), torch.arange(len(x), device=y.device)]
