"""Damped guidance (Dandapanthula and Boffi 2026, arXiv 2606.02884): its toys.

Plug-in guidance takes `∇ R(x̂)` for the value's gradient, x̂ one sample of the posterior or its
mean: it is too strong inside a mode. Damping divides it by `1 + 2 λ σ²_{1|t}`. A step reward has
no gradient: there best-of-n chooses the mode.
"""

from typing import Any

import torch
from torch import Tensor

import steer
from benchmarks.published.das import mean_reward
from benchmarks.published.figure import Figure, deviation, drawn, mean, plugged_in
from benchmarks.toys import tanh_reward
from steer.guidance.ascent import whole_reward
from steer.guidance.potential import Denoised
from steer.reward import Reward, wrap

NOTE = (
    "The figures of the publication's toys are plots of 200 points, so closed forms and "
    "quadrature stand in their place; the setting is that of the authors' code: λ = 3, modes at "
    "(-2.5, 0) and (2.5, 0) of variance .5, -|x - (0, 2.5)|². Plug-in: the gradient through k "
    "GLASS samples of the posterior, 20 steps each. `dps` and `damped` take the posterior's mean, "
    "where the publication takes a sample. 1,000 samples, 100 steps of a jump and a push in place "
    "of 50 of Heun."
)
N, STEPS, STRENGTH = 1000, 100, 3.0
POINTS = {(0.3, -0.3): (2.408, 5.667, 5.409), (0.5, 0.2): (1.037, 1.555, 2.264),
          (0.7, 0.6): (0.498, 0.566, 0.592)}  # fmt: skip
"""(t, x) -> shift of the velocity: exact, plug-in by the map, plug-in by the denoiser."""
WAYS: dict[str, dict[str, Any]] = {
    "plug-in, k = 1": {"k": 1},
    "plug-in, k = 8": {"k": 8},
    "plug-in, k = 1, damped": {"k": 1, "damp": True},
    "dps": {},
    "damped": {"damp": True},
}


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


def samples(
    way: str,
    flow: steer.GaussianMixture,
    reward: Reward,
    strength: float,
    damp: float,
    n: int = N,
    steps: int = STEPS,
) -> Tensor:
    """Return samples of one of the `WAYS`, damped as for a posterior of N(0, damp²), (n, d)."""
    chosen = WAYS[way]
    options: dict[str, Any] = {"damp": damp} if chosen.get("damp") else {}
    if "k" not in chosen:
        name = "damped" if options else "dps"
        return drawn(name, flow, reward, 1 / strength, steps, n, **options)
    draw = steer.Glass(flow, 20).sample
    return plugged_in(
        draw, chosen["k"], "through", flow, reward, 1 / strength, steps, n, **options
    )


def quadratic() -> list[Figure]:
    """Return mean and deviation along the reward on a Gaussian, and the reward on two."""
    reward = steer.QuadraticReward(torch.tensor([0.0, 2.5]), 2 * torch.eye(2))
    one, two = steer.GaussianMixture(torch.zeros(1, 2), 0.5), modes()
    q, _ = one.tilt(reward, 1 / STRENGTH)
    middle, sd = float(q.means[0, 1]), float(q.covariances[0, 1, 1]) ** 0.5
    height = mean_reward(two.tilt(reward, 1 / STRENGTH)[0], reward)
    made = []
    for way in WAYS:
        x = samples(way, one, reward, STRENGTH, 0.5**0.5)[:, 1]
        r = reward(samples(way, two, reward, STRENGTH, 0.5**0.5), None)
        made += [
            mean(f"one Gaussian, {way}: mean along the reward", middle, x, "closed form"),
            deviation(f"one Gaussian, {way}: sd along the reward", sd, x),
            mean(f"two modes, {way}: E r", height, r, "closed form"),
        ]
    return made


def modes() -> steer.GaussianMixture:
    """Return the two modes."""
    return steer.GaussianMixture(torch.tensor([[-2.5, 0.0], [2.5, 0.0]]), 0.5)


def under_the_well(flow: steer.GaussianMixture) -> tuple[float, float]:
    """Return E r and the spread of x_2 - .4 x_1 under the tilt, by quadrature."""
    side = torch.linspace(-6, 6, 1201, dtype=torch.float64)
    x = torch.cartesian_prod(side, side)
    w = (STRENGTH * well(x) + flow.log_prob(x)).softmax(0)
    off = x[:, 1] - 0.4 * x[:, 0]
    return float(w @ well(x)), float((w @ off.square()).sqrt())


def double_well() -> list[Figure]:
    """Return the reward and the spread across the valley."""
    flow = modes()
    wanted, across = under_the_well(flow)
    made = []
    for way in WAYS:
        x = samples(way, flow, wrap(well), STRENGTH, 50.0)
        where = f"double well, {way}"
        made += [
            mean(f"{where}: E r", wanted, well(x), "quadrature"),
            deviation(f"{where}: spread across", across, x[:, 1] - 0.4 * x[:, 0], "quadrature"),
        ]
    return made


def figures() -> list[Figure]:
    """Return the figures of all toys."""
    made = []
    for (t, x), wanted in POINTS.items():
        names = ("exact", "plug-in, map", "plug-in, denoiser")
        for name, w, ours in zip(names, wanted, shift(t, x), strict=True):
            made.append(
                Figure(f"shift at t = {t}, {name}", w, ours, source="independent solution")
            )
    return made + quadratic() + double_well() + selection(2000, 200)


def selection(n: int, steps: int) -> list[Figure]:
    """Return how often the right mode of ½ N(-3, 1) + ½ N(3, 1) is chosen."""
    flow = steer.GaussianMixture(torch.tensor([[-3.0], [3.0]]), 1.0)
    g = torch.Generator().manual_seed(4)
    made = []
    for k in (1, 2, 4):  # the step reward has no gradient: best-of-n alone
        x = flow.jump(torch.randn(n * k, 1, generator=g), 0.0, 1.0).reshape(n, k)
        right = (x > 0).any(1).double()
        name = f"step reward, best of {k}, right mode"
        made.append(mean(name, 1 - 0.5**k, right, "closed form"))
    bump = wrap(lambda y: 5 * torch.exp(-0.5 * (y[:, 0] - 3).square()))
    grid = torch.linspace(-9, 9, 18_001, dtype=torch.float64)[:, None]
    q = (flow.log_prob(grid) + bump(grid, None)).softmax(0)
    wanted = float(q[grid[:, 0] > 0].sum())
    for way in ("plug-in, k = 1", "dps", "damped"):
        x = samples(way, flow, bump, 1.0, 1.0, n, steps)
        right = (x[:, 0] > 0).double()
        made.append(mean(f"bump reward, right mode, {way}", wanted, right, "quadrature"))
    return made
