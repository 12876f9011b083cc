"""Toys of damped guidance (Dandapanthula and Boffi 2026, arXiv 2606.02884).

Plug-in guidance uses `∇ R(x̂)` instead of the value's gradient: it is too strong inside a mode and
does not reweight the modes. Damping divides it by `1 + 2 λ σ²_{1|t}`; modes are chosen by
best-of-n.
"""

import torch
from torch import Tensor

import steer
from benchmarks.published.figure import Figure, drawn, mean
from benchmarks.toys import tanh_reward
from steer.guidance.ascent import whole_reward
from steer.guidance.potential import Denoised
from steer.reward import wrap

NOTE = (
    "The figures of the publication's toys are plots, so closed forms and quadrature stand in "
    "their place. Assumed where nothing is public: the quadratic reward is -(x_2 - 2.5)², the "
    "double well's bases are N(0, σ² I), 2,000 samples in place of 200, 200 steps."
)
N, STEPS = 2000, 200
POINTS = {(0.3, -0.3): (2.408, 5.667, 5.409), (0.5, 0.2): (1.037, 1.555, 2.264),
          (0.7, 0.6): (0.498, 0.566, 0.592)}  # fmt: skip
"""(t, x) -> shift of the velocity: exact, plug-in by the map, plug-in by the denoiser."""


def well(x: Tensor) -> Tensor:
    """Return `-.125 (x_1⁴ - 12.5 x_1²) - (x_2 - .4 x_1)²`, (n,)."""
    a, b = x[:, 0], x[:, 1]
    return -0.125 * (a**4 - 12.5 * a**2) - (b - 0.4 * a).square()


def shift(t: float, at: float) -> tuple[float, float, float]:
    """Return `(1-t)/t ∇V` at a point of the line: exact, by the map, by the denoiser."""
    means = torch.tensor([[-2.0], [0.5], [2.0]])
    flow = steer.GaussianMixture(means, 0.16, torch.tensor([0.4, 0.35, 0.25]))
    reward = wrap(tanh_reward)
    x = torch.tensor([[at]], dtype=torch.float64)
    grid = torch.linspace(-6, 6, 40_001, dtype=torch.float64)[:, None]
    leaf = x.clone().requires_grad_()
    log_p = flow.log_prob(grid) - (leaf - t * grid[:, 0]).square()[0] / (2 * (1 - t) ** 2)
    value = (log_p + reward(grid, None)).logsumexp(0) - log_p.logsumexp(0)
    (exact,) = torch.autograd.grad(value, leaf)
    views = (
        whole_reward(flow, reward, None), Denoised(flow, reward, None, 1.0, ramp=torch.ones_like),
    )  # fmt: skip
    c = (1 - t) / t
    by_map, by_denoiser = (c * float(v.gradient(x, t)[1]) for v in views)
    return c * float(exact), by_map, by_denoiser


def modes() -> tuple[steer.GaussianMixture, steer.QuadraticReward]:
    """Return two modes at x_1 = -2.5 and 2.5, and -(x_2 - 2.5)²."""
    flow = steer.GaussianMixture(torch.tensor([[-2.5, 0.0], [2.5, 0.0]]), 0.5)
    return flow, steer.QuadraticReward(
        torch.tensor([0.0, 2.5]), torch.diag(torch.tensor([0, 2.0]))
    )


def under_the_well(variance: float, strength: float) -> tuple[float, float]:
    """Return E r and the spread of x_2 - .4 x_1 under the tilt of N(0, variance I)."""
    side = torch.linspace(-14, 14, 2801, dtype=torch.float64)
    x = torch.cartesian_prod(side, side)
    w = (strength * well(x) - x.square().sum(1) / (2 * variance)).softmax(0)
    off = x[:, 1] - 0.4 * x[:, 0]
    return float(w @ well(x)), float((w @ off.square()).sqrt())


def figures(n: int = N, steps: int = STEPS) -> list[Figure]:
    """Return the figures of all toys."""
    made = []
    for (t, x), wanted in POINTS.items():
        names = ("exact", "plug-in, map", "plug-in, denoiser")
        for name, w, ours in zip(names, wanted, shift(t, x), strict=True):
            made.append(
                Figure(f"shift at t = {t}, {name}", w, ours, source="independent solution")
            )
    flow, reward = modes()
    for name, options in (("dps", {}), ("damped", {"damp": 0.5**0.5})):
        x = drawn(name, flow, reward, 1.0, steps, n, **options)
        made += [
            mean(f"two modes, mean of x_2, {name}", 1.25, x[:, 1], "closed form"),
            Figure(
                f"two modes, sd of x_2, {name}", 0.5, float(x[:, 1].std()), source="closed form"
            ),
        ]
    for variance, strength in ((0.5, 1.0), (16.0, 0.1)):
        base = steer.GaussianMixture(torch.zeros(1, 2), variance)
        wanted_r, wanted_off = under_the_well(variance, strength)
        where = f"double well, σ² = {variance:g}, λ = {strength:g}"
        for name, options in (("dps", {}), ("damped", {"damp": variance**0.5})):
            x = drawn(name, base, wrap(well), 1 / strength, steps, n, **options)
            off = (x[:, 1] - 0.4 * x[:, 0]).square().mean().sqrt()
            made += [
                mean(f"{where}, E r, {name}", wanted_r, well(x), "quadrature"),
                Figure(f"{where}, spread across, {name}", wanted_off, float(off),
                       source="quadrature"),
            ]  # fmt: skip
    return made + selection(n, steps)


def selection(n: int, steps: int) -> list[Figure]:
    """Return how often the right mode of ½ N(-3, 1) + ½ N(3, 1) is chosen."""
    flow = steer.GaussianMixture(torch.tensor([[-3.0], [3.0]]), 1.0)
    g = torch.Generator().manual_seed(4)
    made = []
    for k in (1, 2, 4):  # the step reward has no gradient: only best-of-n
        x = flow.jump(torch.randn(n * k, 1, generator=g), 0.0, 1.0).reshape(n, k)
        right = (x > 0).any(1).double()
        name = f"step reward, best of {k}, right mode"
        made.append(mean(name, 1 - 0.5**k, right, "closed form"))
    bump = wrap(lambda y: 5 * torch.exp(-0.5 * (y[:, 0] - 3).square()))
    grid = torch.linspace(-9, 9, 18_001, dtype=torch.float64)[:, None]
    q = (flow.log_prob(grid) + bump(grid, None)).softmax(0)
    wanted = float(q[grid[:, 0] > 0].sum())
    for name, options in (("dps", {}), ("damped", {"damp": 1.0})):
        x = drawn(name, flow, bump, 1.0, steps, n, **options)
        made.append(
            mean(f"bump reward, right mode, {name}", wanted, (x[:, 0] > 0).double(), "quadrature")
        )
    return made
