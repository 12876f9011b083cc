"""Meta Flow Maps (Potaptchik et al. 2026, arXiv 2601.14430) on their mixture with a measurement.

Three modes at (-3, -3), (0, 0), (3, 3), covariance .5 I; `y = a.x + ε`, a = (1.2, -.8), ε of
standard deviation .2, y = -1. The gradient-free velocity from N draws of the posterior is
`b* = b + (Σ softmax(R)_i x_i - mean_i x_i) / (1-t)`, and Euler steps follow it.
"""

import torch

import steer
from benchmarks.published.figure import Figure
from benchmarks.tilt_toys import sliced_distance

NOTE = (
    "Published in plots alone, so no number is compared: what is checked is that the distance "
    "falls with N to that of exact samples. The publication trains a posterior map; its draws are "
    "exact here. 250 Euler steps in place of 1,000, 1,000 samples, three seeds."
)
A, SIGMA, Y = (1.2, -0.8), 0.2, -1.0


def mixture() -> steer.GaussianMixture:
    """Return the prior."""
    return steer.GaussianMixture(torch.tensor([[-3.0, -3.0], [0.0, 0.0], [3.0, 3.0]]), 0.5)


def reward() -> steer.QuadraticReward:
    """Return the log-likelihood of the measurement, without its constant."""
    a = torch.tensor(A)
    return steer.QuadraticReward(a * Y / (a @ a), torch.outer(a, a) / SIGMA**2)


def steered(draws: int, n: int = 1000, steps: int = 250, seed: int = 0) -> torch.Tensor:
    """Return n samples by the gradient-free velocity with this number of posterior samples."""
    flow, score, g = mixture(), reward(), torch.Generator().manual_seed(seed)
    x = torch.randn(n, 2, generator=g)
    for k in range(steps):
        t = k / steps
        ends = flow.posterior_sample(x, t, draws, g)
        r = score(ends.flatten(0, 1), None).reshape(draws, n)
        pull = (r.softmax(0)[..., None] * ends).sum(0) - ends.mean(0)
        x = x + (flow.velocity(x, t) + pull / (1 - t)) / steps
    return x


def figures(counts: tuple[int, ...] = (1, 4, 16, 64, 128), seeds: int = 3) -> list[Figure]:
    """Return the sliced distance to the exact posterior, by number of samples."""
    posterior, _ = mixture().tilt(reward())
    exact = [posterior.sample(1000, torch.Generator().manual_seed(50 + s)) for s in range(seeds)]
    other = [posterior.sample(1000, torch.Generator().manual_seed(90 + s)) for s in range(seeds)]

    def figure(what: str, sets: list[torch.Tensor]) -> Figure:
        found = torch.tensor(
            [sliced_distance(x, y) for x, y in zip(sets, exact, strict=True)]
        ).double()
        return Figure(what, None, float(found.mean()), float(found.std()) / seeds**0.5)

    made = [
        figure(f"sliced W2, N = {count}", [steered(count, seed=s) for s in range(seeds)])
        for count in counts
    ]
    return [*made, figure("sliced W2, exact samples", other)]
