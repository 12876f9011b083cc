"""Meta Flow Maps (Potaptchik et al. 2026, arXiv 2601.14430) on their mixture with a measurement.

Three modes at (-3, -3), (0, 0), (3, 3), equal weights, covariance .5 I; `y = a.x + ε`,
a = (1.2, -.8), ε of standard deviation .2, y = -1. The ODE `b + c_t ∇V` is steered by N posterior
samples a step: by their weights alone (MFM-GF), or by the reward's gradient through them (MFM-G).
The measure is the sliced Wasserstein-2 distance to the exact posterior.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import steer
from benchmarks.published.figure import Figure, drawn, mean, plugged_in, seeded
from benchmarks.tilt_toys import sliced_distance

NOTE = (
    "Published in plots alone, so no number is compared: what is checked is that the distance "
    "falls with N to that of exact samples. The publication trains a posterior map; here the "
    "samples of MFM-GF are exact, and those of MFM-G by GLASS in 8 steps. 250 steps in place "
    "of 1,000 (the line with 1,000 shows no difference), 1,000 samples in place of 4,096, three "
    "seeds. The weighted methods have 4,096 particles, as the publication's SMC."
)
A, SIGMA, Y = (1.2, -0.8), 0.2, -1.0
N = 1000


def mixture() -> steer.GaussianMixture:
    """Return the prior."""
    return steer.GaussianMixture(torch.tensor([[-3.0, -3.0], [0.0, 0.0], [3.0, 3.0]]), 0.5)


def reward() -> steer.QuadraticReward:
    """Return the log-likelihood of the measurement, without its constant."""
    a = torch.tensor(A)
    return steer.QuadraticReward(a * Y / (a @ a), torch.outer(a, a) / SIGMA**2)


def without_gradient(count: int, seed: int, steps: int = 250) -> Tensor:
    """Return samples of MFM-GF with so many posterior samples a step, (N, 2)."""
    flow = mixture()
    return plugged_in(
        flow.posterior_sample, count, "covariance", flow, reward(), 1.0, steps, N, seed
    )


def with_gradient(count: int, seed: int, steps: int = 250) -> Tensor:
    """Return samples of MFM-G, (N, 2)."""
    flow = mixture()
    glass = steer.Glass(flow, 8)
    return plugged_in(glass.sample, count, "through", flow, reward(), 1.0, steps, N, seed)


def weighted(method: str, steps: int, seed: int, **options: Any) -> Tensor:
    """Return samples of a method of the table by its weights, (N, 2)."""
    end = steer.sample(
        mixture(), reward(), particles=4096, steps=steps, method=method, temperature=1.0,
        seed=seed, progress=False, **options,
    )  # fmt: skip
    g = seeded(seed)
    return end.x[torch.multinomial(end.log_w.softmax(-1).float(), N, True, generator=g)]


def figures(counts: Sequence[int] = (1, 4, 16, 64), seeds: int = 3) -> list[Figure]:
    """Return the sliced distance to the exact posterior, by method and number of samples."""
    posterior, _ = mixture().tilt(reward())
    few = [n for n in counts if n <= 16]
    ways: dict[str, Callable[[int], Tensor]] = {
        f"MFM-GF, N = {n}": partial(without_gradient, n) for n in counts
    }
    ways |= {"MFM-GF, N = 16, 1,000 steps": partial(without_gradient, 16, steps=1000)}
    ways |= {f"MFM-G, N = {n}": partial(with_gradient, n) for n in few}
    ways |= {
        "dps": lambda s: drawn("dps", mixture(), reward(), 1.0, 250, N, s),
        "tds, 25 steps": lambda s: weighted("tds", 25, s),
        "posterior, 25 steps": lambda s: weighted("posterior", 25, s, by="glass", draws=16),
        "split, 25 steps": lambda s: weighted("split", 25, s),
        "noise-smc, 25 steps": lambda s: weighted("noise-smc", 25, s),
        "exact samples": lambda s: posterior.sample(N, seeded(90 + s)),
    }
    made = []
    for what, draw in ways.items():
        pairs = ((draw(s), posterior.sample(N, seeded(50 + s))) for s in range(seeds))
        found = torch.tensor([sliced_distance(x, y) for x, y in pairs])
        made.append(mean(f"sliced W2, {what}", None, found))
    return made
