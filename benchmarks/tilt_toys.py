"""Tuning towards the exponential tilt of a mixture, compared with its closed form.

`python -m benchmarks.tilt_toys` prints, for each objective whose optimum is `p exp(R) / Z`, how
far plain samples of the tuned flow are from it: by 32 Heun steps of the velocity, and by the map
in one and in four jumps. The base is two Gaussians in the plane; a linear reward shifts each and
moves mass from one to the other. The network is `Corrected` with adapters. Means and covariances
are averaged over the seeds before they are compared, distances after. The first two lines are the
base, and fresh samples of the tilt, a lower bound for any sampler.
"""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

import steer
from steer.adapters.inject import adapt
from steer.noise import Draws
from steer.objectives.adjoint import Adjoint
from steer.objectives.amortise import Amortise
from steer.objectives.batch import Batch, Objective
from steer.objectives.value import Value
from steer.testing import Corrected

OBJECTIVES: dict[str, Callable[[], Objective]] = {
    "value": Value,
    "value, 4 draws": lambda: Value(draws=4),
    "value, student's points": lambda: Value(draws=2, policy="student"),
    "value, no gradient": lambda: Value(gradient=False, draws=1),
    "amortise": lambda: Amortise(particles=4096, group=256, guide_steps=8),
    "adjoint": lambda: Adjoint(steps=16, subset=8),
}


def mixture() -> steer.GaussianMixture:
    """Return the base, its map within 1.3e-3: three times faster than to the usual accuracy."""
    means = torch.tensor([[-1.5, 0.0], [1.5, 0.5]])
    base = steer.GaussianMixture(means, torch.tensor([0.4, 0.2]), torch.tensor([0.6, 0.4]))
    base._steps = 8
    return base


def reward() -> steer.LinearReward:
    """Return R, whose standard deviation under the base is 1.4."""
    return steer.LinearReward(torch.tensor([0.9, -0.5]))


def train(
    make: Callable[[], Objective], seed: int = 0, steps: int = 1000, n: int = 256
) -> steer.FlowMap:
    """Return the running average of adapters tuned by AdamW, its rate falling to zero."""
    tuned = adapt(Corrected(mixture(), seed=seed), rank=16, seed=seed)
    tuned.add("average")
    average, objective = tuned.at(1.0, "average"), make()
    own, mean = tuned.adapters(), average.adapters("average")
    for p in own.values():
        p.requires_grad_(True)
    optimiser = torch.optim.AdamW(own.values(), lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for step in range(steps):
        rows = Draws(seed, step, (0, n))
        batch = Batch(tuned, tuned.base, average, reward(), 1.0, rows, unbound=tuned.base)
        optimiser.zero_grad()
        objective(batch)["loss"].backward()
        torch.nn.utils.clip_grad_norm_(own.values(), 1.0)
        optimiser.step()
        schedule.step()
        with torch.no_grad():
            for p, q in zip(mean.values(), own.values(), strict=True):
                p.lerp_(q, max(0.01, 1 / (step + 1)))
    return average


@torch.no_grad()
def samples(flow: steer.FlowMap, x: Tensor) -> dict[str, Tensor]:
    """Return samples from the noise x by each of the samplers, (n, d) each."""
    y, h = x, 1 / 32
    for k in range(32):
        v = flow.velocity(y, k * h)
        y = y + h / 2 * (v + flow.velocity(y + h * v, (k + 1) * h))
    jumps = x
    for k in range(4):
        jumps = flow.jump(jumps, k / 4, (k + 1) / 4)
    return {"32 Heun steps": y, "1 jump": flow.jump(x, 0.0, 1.0), "4 jumps": jumps}


def sliced_distance(x: Tensor, y: Tensor, directions: int = 64) -> float:
    """Return the sliced Wasserstein-2 distance of two sets of n points in the plane."""
    angle = torch.arange(directions, dtype=x.dtype) * (torch.pi / directions)
    u = torch.stack([angle.cos(), angle.sin()])
    a, b = ((z @ u).sort(0).values for z in (x, y))
    return float((a - b).double().square().mean().sqrt())


def moments() -> tuple[Tensor, Tensor]:
    """Return the tilt's mean and covariance."""
    tilted, _ = mixture().tilt(reward())
    mean = (tilted.weights[:, None] * tilted.means).sum(0)
    gap = tilted.means - mean
    spread = tilted.covariances + gap[:, :, None] * gap[:, None, :]
    return mean, (tilted.weights[:, None, None] * spread).sum(0)


def figures(sets: list[Tensor], references: list[Tensor]) -> dict[str, float]:
    """Compare sets of points, one per seed, with the tilt and with samples of it.

    Returns:
        "mean": the error of the sets' mean, averaged, in standard deviations, the larger one.
        "covariance": that of their covariance, averaged, relative in the Frobenius norm.
        "sliced": the mean of their sliced distances.
    """
    mean, cov = moments()
    found = torch.stack([x.double().mean(0) for x in sets]).mean(0)
    spread = torch.stack([torch.cov(x.double().T) for x in sets]).mean(0)
    distance = [sliced_distance(x, y) for x, y in zip(sets, references, strict=True)]
    return {
        "mean": float(((found - mean) / cov.diagonal().sqrt()).abs().max()),
        "covariance": float((spread - cov).norm() / cov.norm()),
        "sliced": sum(distance) / len(distance),
    }


def run(
    make: Callable[[], Objective] | None, seeds: int, steps: int = 1000, count: int = 2048
) -> dict[str, dict[str, float]]:
    """Train with each seed, and return the figures of each sampler; None: those of the base."""
    tilted, _ = mixture().tilt(reward())
    sets: dict[str, list[Tensor]] = {}
    references = []
    for seed in range(seeds):
        source = torch.Generator().manual_seed(1000 + seed)
        x = torch.randn(count, 2, generator=source)
        references.append(tilted.sample(count, source))
        if make is None:
            drawn = {"base": mixture().jump(x, 0.0, 1.0), "tilt": tilted.sample(count, source)}
        else:
            drawn = samples(train(make, seed, steps), x)
        for way, points in drawn.items():
            sets.setdefault(way, []).append(points)
    return {way: figures(points, references) for way, points in sets.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--only", nargs="*", default=list(OBJECTIVES), choices=list(OBJECTIVES))
    options = parser.parse_args()
    print("| objective | samples | mean, sd | covariance | sliced W2 |\n|---|---|---|---|---|")
    for name in [None, *options.only]:
        make = None if name is None else OBJECTIVES[name]
        for way, f in run(make, options.seeds, options.steps).items():
            cells = " | ".join(f"{f[kind]:.3f}" for kind in ("mean", "covariance", "sliced"))
            print(f"| {name or 'no tuning'} | {way} | {cells} |", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
