"""Flow-map reward guidance (Huang et al. 2026, arXiv 2604.27147) on the transport toy.

The toy is that of 2609.27033: base N(0, 1), linear path, `r = exp(-(y - 4.75)² / (2 2.25²))`. It
prints .142 for the base, .367 for the exponential tilt and .617 for the transport optimum, at
λ = 7. Guidance is `dx = (b + λ ∇ r(X(t,1,x))) dt`, the base's lookahead, not normalised; its
reference figures beside the optimum of `λ E r - ½ E ∫|u|² dt` are not published, but from an
independent numerical solution of the same equation.
"""

import torch

import steer
from benchmarks.published.figure import Figure
from benchmarks.tuning_oracles import CENTRE, bump, transport_optimum
from steer.guidance.ascent import whole_reward
from steer.reward import wrap

NOTE = "Quadrature over the noise, Heun steps: no sampling error."
SOLVED = {1: (0.171, 0.157), 3: (0.249, 0.587), 7: (0.460, 2.109)}
"""λ -> mean reward and objective of guidance, from an independent solution."""
PUBLISHED = {"base": 0.142, "exponential tilt": 0.367, "transport optimum": 0.617}


def guided(strength: float, steps: int = 200, n: int = 2001) -> tuple[float, float]:
    """Return mean reward and objective of guidance by the base's lookahead."""
    flow = steer.GaussianMixture(torch.zeros(1, 1), 1.0)
    view = whole_reward(flow, wrap(bump), None)
    x = torch.linspace(-6, 6, n, dtype=torch.float64)[:, None]
    weight = torch.softmax(-0.5 * x[:, 0].square(), 0)
    spent, h = torch.zeros(n, dtype=torch.float64), 1 / steps

    def slope(y: torch.Tensor, t: float) -> tuple[torch.Tensor, torch.Tensor]:
        u = strength * view.gradient(y, t)[1]
        return flow.velocity(y, t) + u, u[:, 0].square()

    for k in range(steps):
        v, cost = slope(x, k * h)
        w, cost_there = slope(x + h * v, (k + 1) * h)
        x, spent = x + h / 2 * (v + w), spent + h / 4 * (cost + cost_there)
    r = bump(x)
    return float(weight @ r), float(weight @ (strength * r - spent))


def tilted(strength: float) -> float:
    """Return the mean reward under the exponential tilt; strength 0 is the base."""
    y = torch.linspace(-8, CENTRE + 8, 20001, dtype=torch.float64)[:, None]
    return float(torch.softmax(strength * bump(y) - 0.5 * y[:, 0].square(), 0) @ bump(y))


def figures() -> list[Figure]:
    """Return the toy's published figures, and guidance compared with its optimum."""
    made = [
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
