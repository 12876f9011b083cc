"""Flow-map reward guidance (Huang et al. 2026, arXiv 2604.27147): its Gaussian toy, and others.

Its equation is `dx = (b + λ ∇ r(X(t,1,x))) dt`: here `fmrg-j` with `relative=False`. On N(m, σ²)
and `r = -(x - a)²` it brings every sample nearer to a by the factor `exp(-π λ σ)`, and with
guidance that ends at T by `exp(-2 λ σ (atan(((1 + σ²) T - 1) / σ) + atan(1 / σ)))`.

- The project page draws m = 0, σ = .47, a = 1.5, λ = .49.
- 2606.02884 compares it to the tilt on N(0, σ² I), a = (0, 2.5): σ² = .5, λ = 1, and 16, .1.
- The transport toy is that of 2609.27033: base N(0, 1), `r = exp(-(y - 4.75)² / (2 2.25²))`. It
  prints .142 for the base, .367 for the exponential tilt and .617 for the transport optimum, at
  λ = 7. The reference figures of guidance beside the optimum of `λ E r - ½ E ∫|u|² dt` are not
  published, but from an independent numerical solution of the same equation.
"""

import math
from typing import Any

import torch
from torch import Tensor

import steer
from benchmarks.published.figure import Figure
from benchmarks.tuning_oracles import CENTRE, bump, transport_optimum
from steer.path import step_times
from steer.reward import Reward, wrap
from steer.sampling.methods import TABLE

NOTE = (
    "Quadrature over the noise: no sampling error; 400 Euler steps, in which `fmrg-j` is of first "
    "order. The page's numbers are the closed forms of the publication, with parameters that the "
    "page chose after the publication's plot. For guidance that ends early the page interpolates "
    "the exponent linearly in T, which is no solution of the equation; ours is. The publication's "
    "own tables (GenEval, inverse problems) are of FLUX."
)
SOLVED = {1: (0.171, 0.157), 3: (0.249, 0.587), 7: (0.460, 2.109)}
"""λ -> mean reward and objective of guidance, from an independent solution."""
PUBLISHED = {"base": 0.142, "exponential tilt": 0.367, "transport optimum": 0.617}
SPREAD, TARGET, STRENGTH = 0.47, 1.5, 0.49


def controlled(
    flow: steer.GaussianMixture,
    reward: Reward,
    strength: float,
    x: Tensor,
    steps: int,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Return where `fmrg-j` leads the noise x, (n, d), and `½ ∫ |u|² dt` on the way, (n,)."""
    times = step_times(steps)
    build = TABLE["fmrg-j"].build
    sampler = build(flow, reward, None, 1.0, times, scale=strength, relative=False, **options)
    spent = torch.zeros(len(x), dtype=x.dtype)
    for s, t, population in zip(times, times[1:], sampler.steps(x), strict=False):
        u = (population.x - flow.jump(x, s, t)) / (t - s)
        spent, x = spent + (t - s) / 2 * u.square().sum(1), population.x
    return x, spent


def guided(strength: float, steps: int = 400, n: int = 2001) -> tuple[float, float]:
    """Return mean reward and objective of guidance on the transport toy."""
    flow = steer.GaussianMixture(torch.zeros(1, 1), 1.0)
    x = torch.linspace(-6, 6, n, dtype=torch.float64)[:, None]
    weight = torch.softmax(-0.5 * x[:, 0].square(), 0)
    x, spent = controlled(flow, wrap(bump), strength, x, steps)
    return float(weight @ bump(x)), float(weight @ (strength * bump(x) - spent))


def tilted(strength: float) -> float:
    """Return the mean reward under the exponential tilt; strength 0 is the base."""
    y = torch.linspace(-8, CENTRE + 8, 20001, dtype=torch.float64)[:, None]
    return float(torch.softmax(strength * bump(y) - 0.5 * y[:, 0].square(), 0) @ bump(y))


def gaussian(
    spread: float, target: float, strength: float, stop: float = 1.0, steps: int = 400
) -> tuple[float, float]:
    """Return mean and standard deviation of guidance that ends at `stop`, on N(0, spread²)."""
    flow = steer.GaussianMixture(torch.zeros(1, 1), spread**2)
    reward = wrap(lambda y: -(y[:, 0] - target).square())
    x = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)  # the map is linear
    window: dict[str, Any] = {} if stop == 1 else {"window": (0.0, stop)}
    x, _ = controlled(flow, reward, strength, x, steps, **window)
    return float(x.mean()), float(x[1] - x[0]) / 2


def shrunk(spread: float, target: float, factor: float) -> tuple[float, float]:
    """Return mean and standard deviation once every distance to the target has shrunk."""
    return target * (1 - factor), spread * factor


def contraction(spread: float, strength: float, stop: float = 1.0) -> float:
    """Return the factor by which guidance until `stop` shrinks distances."""
    angle = math.atan(((1 + spread**2) * stop - 1) / spread) + math.atan(1 / spread)
    return math.exp(-2 * strength * spread * angle)


def on_gaussians() -> list[Figure]:
    """Return mean and standard deviation of tilt and guidance on the Gaussians."""
    toy = (SPREAD, TARGET, STRENGTH)
    base = steer.GaussianMixture(torch.zeros(1, 1), SPREAD**2)
    reward = steer.QuadraticReward(torch.tensor([TARGET]), torch.tensor([[2.0]]))
    q, _ = base.tilt(reward, 1 / STRENGTH)
    tilt = float(q.means), float(q.covariances) ** 0.5
    early, until = gaussian(*toy, stop=0.5), contraction(SPREAD, STRENGTH, 0.5)
    narrow, wide = (0.5**0.5, 2.5, 1.0), (4.0, 2.5, 0.1)
    rows = [
        ("page's toy, tilt", "project page", (0.2669, 0.4261), tilt),
        ("page's toy, guidance", "project page", (0.7723, 0.2280), gaussian(*toy)),
        ("page's toy, guidance until .5", "project page", (0.4553, 0.3273), early),
        ("the same", "closed form", shrunk(SPREAD, TARGET, until), early),
        ("σ² = .5, λ = 1", "closed form", shrunk(0.5**0.5, 2.5, contraction(0.5**0.5, 1.0)),
         gaussian(*narrow)),
        ("σ² = 16, λ = .1", "closed form", shrunk(4.0, 2.5, contraction(4.0, 0.1)),
         gaussian(*wide)),
    ]  # fmt: skip
    return [
        Figure(f"{where}: {name}", w, o, source=source)
        for where, source, wanted, ours in rows
        for name, w, o in zip(("mean", "sd"), wanted, ours, strict=True)
    ]


def figures() -> list[Figure]:
    """Return the toys' figures, and guidance on the transport toy compared with its optimum."""
    made = [
        *on_gaussians(),
        Figure("E r, base", PUBLISHED["base"], tilted(0)),
        Figure("E r, exponential tilt, λ = 7", PUBLISHED["exponential tilt"], tilted(7)),
        Figure(
            "E r, transport optimum, λ = 7", PUBLISHED["transport optimum"], transport_optimum()[0]
        ),
    ]
    for strength, wanted in SOLVED.items():
        reward, objective = guided(strength)
        where = f"lookahead's guidance, λ = {strength}"
        made += [
            Figure(f"E r, {where}", wanted[0], reward, source="independent solution"),
            Figure(f"objective, {where}", wanted[1], objective, source="independent solution"),
            Figure(
                f"its share of the optimum's objective, λ = {strength}", None,
                objective / transport_optimum(strength=strength)[1],
            ),
        ]  # fmt: skip
    return made
