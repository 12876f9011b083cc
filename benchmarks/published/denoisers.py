"""The perception-distortion knob of flow-map denoisers (arXiv 2606.19802), on their mixture.

Two modes at (4.5, 3.5) and (3.5, 5.5), equal weights, standard deviation .35. From `x_s` the views
`x̂_u = x_s + (1-s) (X(s,u,x_s) - x_s) / (u - s)` go from the denoiser, u = s, which has the
smallest mean square error, to the map's end, u = 1, which has the law of the data.
"""

import torch
from torch import Tensor

import steer
from benchmarks.published.figure import Figure, assigned, mean, seeded

NOTE = (
    "Published: two tables of the authors' repository, each of one run without an error, by the "
    "closed-form velocity: 2,000 points and 200 Euler steps, 5,000 points and 100 Runge-Kutta "
    "steps. The distance is that of exact transport to as many other points, so it depends on "
    "their number; that of two exact sets is the last line. At 5,000 points only u = 1 is "
    "computed: the assignment of a denoiser's points takes minutes."
)
MIXTURE = [[4.5, 3.5], [3.5, 5.5]]
PUBLISHED = {  # (s, u): error and distance with 5,000 points, distance with 2,000
    (0.3, 0.3): (1.1859, 0.5379, 0.5315),
    (0.3, 0.65): (1.3599, 0.1224, 0.1226),
    (0.3, 1.0): (1.7206, 0.0038, 0.0098),
    (0.5, 0.5): (0.6178, 0.1379, 0.1375),
    (0.5, 1.0): (0.7604, 0.0094, 0.0056),
    (0.7, 0.7): (0.1753, 0.0391, 0.0335),
    (0.7, 1.0): (0.2034, 0.0151, 0.0102),
}


def mixture() -> steer.GaussianMixture:
    """Return the mixture."""
    return steer.GaussianMixture(torch.tensor(MIXTURE), 0.35**2)


def view(flow: steer.GaussianMixture, x: Tensor, s: float, u: float) -> Tensor:
    """Return x̂_u, (n, d)."""
    if u == s:
        return flow.denoise(x, s)
    return x + (1 - s) / (u - s) * (flow.jump(x, s, u) - x)


def seen(n: int, seed: int, s: float, u: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return n clean points, what they are seen as from s, and n others, (n, 2) each."""
    flow, g = mixture(), seeded(seed)
    clean, other = flow.sample(n, g), flow.sample(n, g)
    x = s * clean + (1 - s) * torch.randn(n, 2, generator=g)
    return clean, view(flow, x, s, u), other


def distance(n: int, seeds: int, s: float, u: float) -> Tensor:
    """Return the squared Wasserstein-2 distance of each seed, (seeds,)."""
    sets = (seen(n, seed, s, u) for seed in range(seeds))
    return torch.tensor([assigned(y, other, 2) for _, y, other in sets])


def figures(few: int = 2000, many: int = 5000, seeds: int = 4) -> list[Figure]:
    """Return error and distance of the published views, and the distance of two exact sets."""
    made = []
    for (s, u), (error, by_many, by_few) in PUBLISHED.items():
        where = f"s = {s:g}, u = {u:g}"
        clean, y, _ = seen(4 * many, seeds, s, u)
        made += [
            mean(f"mean square error, {where}", error, (y - clean).square().sum(1)),
            mean(f"W2², {where}, {few:,} points", by_few, distance(few, seeds, s, u)),
        ]
        if u == 1:
            found = distance(many, 2, s, u)
            made.append(mean(f"W2², {where}, {many:,} points", by_many, found))
    for n, count in ((few, seeds), (many, 2)):
        sets = (seen(n, seed, 0.3, 0.3) for seed in range(count))
        floor = torch.tensor([assigned(clean, other, 2) for clean, _, other in sets])
        made.append(mean(f"W2² of two exact sets, {n:,} points", None, floor))
    return made
