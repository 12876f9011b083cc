"""Flow-map trajectory tilting's ring of modes, with search (Sabour et al. 2025, 2511.22688).

As in `benchmarks.toys`, guided by the lookahead, but with a number of selections at equally spaced
times, which keep the 32 particles with the highest reward of their lookahead, in 20 copies each.
"""

import math
from typing import Any

import torch

from benchmarks.published.figure import Figure, mean
from benchmarks.toys import ring_guide, ring_reward

NOTE = (
    "Published: with 2, 3 and 4 selections 100 % of x_a > 0 and mean reward 0.00, in one or two "
    "modes. Radius 4.7, variance .3, ε_t = 1.5 (1-t), 100 steps and equal times of selection are "
    "assumed. Three seeds of 640 particles. A mode counts that holds a hundredth of them all. On "
    "the right the reward is 0, so the best 32 are among equals: with the copies of a particle "
    "side by side and ties decided by index, they are copies of few, and modes are lost as "
    "published; with the copies in turn, as `keep` makes them, few are."
)


def searched(
    selections: int, seed: int, adjacent: bool = False, particles: int = 640, steps: int = 100
) -> torch.Tensor:
    """Return the particles at the end, (particles, 2); `adjacent`: copies are side by side."""
    guide = ring_guide("flow map", torch.linspace(0, 1, steps + 1, dtype=torch.float64))
    flow: Any = guide.kernel.flow
    flow._steps = 16  # within 1e-3
    at = {round(steps * (i + 1) / (selections + 1)) for i in range(selections)}
    x = torch.randn(particles, 2, generator=torch.Generator().manual_seed(seed))
    for k, population in enumerate(guide.steps(x, seed=seed)):
        if k + 1 in at:
            best = population.reward.argsort(descending=True, stable=True)[:32]
            copies = particles // 32
            population.keep(best.repeat_interleave(copies) if adjacent else best.repeat(copies))
    return population.x


def occupied(x: torch.Tensor) -> int:
    """Return how many of the eight modes have at least 1 % of the particles."""
    nearest = (torch.atan2(x[:, 1], x[:, 0]) / (math.pi / 4)).round().long() % 8
    return int((torch.bincount(nearest, minlength=8) >= 0.01 * len(x)).sum())


def figures(seeds: int = 3) -> list[Figure]:
    """Return share, mean reward and occupied modes by the number of selections."""
    made = []
    for adjacent in (True, False):
        for selections in (2, 3, 4):
            sets = [searched(selections, seed, adjacent) for seed in range(seeds)]
            order = "side by side" if adjacent else "in turn"
            where = f"{selections} selections, copies {order}"
            share = torch.tensor([float((x[:, 0] > 0).float().mean()) for x in sets])
            reward = torch.tensor([float(ring_reward(x).mean()) for x in sets])
            modes = torch.tensor([float(occupied(x)) for x in sets])
            made += [
                mean(f"share of x_a > 0, {where}", 1.0, share),
                mean(f"mean reward, {where}", 0.0, reward),
                mean(f"modes, {where}", None, modes),
            ]
    return made
