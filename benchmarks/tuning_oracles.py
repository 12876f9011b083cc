"""Tuning objectives against closed forms, on tiny networks: `python -m benchmarks.tuning_oracles`.

The transport toy (arXiv 2609.27033): base N(0, 1), linear path, reward
`exp(-(y - 4.75)² / (2 2.25²))`, R = 7 reward. Mean reward .142 for the base, .367 for the
exponential tilt, .617 for the transport optimum, whose objective `E[R - ½∫|u|² dt]` is 2.351;
guidance by the base's lookahead reaches .460 and 2.109.
"""

import argparse
import math
import time

import torch
from torch import Tensor

import steer
from steer.flow import FlowMap
from steer.objectives.parts import squared
from steer.testing import Corrected

__all__ = ["bump", "mean_reward", "objective", "transport", "transport_optimum"]

CENTRE, WIDTH, LAMBDA = 4.75, 2.25, 7.0


def bump(y: Tensor) -> Tensor:
    """Return the toy's reward, (n,)."""
    return torch.exp(-((y[:, 0] - CENTRE) ** 2) / (2 * WIDTH**2))


def transport_optimum(n: int = 20001, strength: float = LAMBDA) -> tuple[float, float]:
    """Return mean reward and objective at the optimum, where each x moves to its best y.

    The cost of moving x_0's picture x to y is `(y - x)² / (2 τ)`, τ = ∫ dt / ((1-t)² + t²) = π/2.
    """
    x = torch.linspace(-6, 6, n, dtype=torch.float64)
    weight = torch.exp(-(x**2) / 2)
    weight = weight / weight.sum()
    y = torch.linspace(-8, 12, 4001, dtype=torch.float64)
    gain = strength * bump(y[:, None]) - (y - x[:, None]) ** 2 / math.pi
    best, index = gain.max(1)
    return float((weight * bump(y[index, None])).sum()), float((weight * best).sum())


def mean_reward(flow: FlowMap, jumps: int = 1, n: int = 40000) -> float:
    """Return the mean reward of n samples with this number of jumps."""
    x = torch.randn(n, 1, generator=torch.Generator().manual_seed(11))
    with torch.no_grad():
        for k in range(jumps):
            x = flow.jump(x, k / jumps, (k + 1) / jumps)
    return float(bump(x).mean())


def objective(tuned: steer.Adapted, steps: int = 100, n: int = 8000) -> tuple[float, float]:
    """Return mean reward and `E[R - ½∫|u|² dt]` along the tuned velocity, by Heun steps."""
    x = torch.randn(n, 1, generator=torch.Generator().manual_seed(12))
    spent, h = torch.zeros(n), 1 / steps
    with torch.no_grad():
        for k in range(steps):
            t = k * h
            v = tuned.velocity(x, t)
            u = v - tuned.base.velocity(x, t)
            y = x + h * v
            w = tuned.velocity(y, t + h)
            u2 = w - tuned.base.velocity(y, t + h)
            spent = spent + h / 4 * (squared(u) + squared(u2))
            x = x + h / 2 * (v + w)
    reward = bump(x)
    return float(reward.mean()), float((LAMBDA * reward - spent).mean())


def transport(steps: int = 1500, seed: int = 0, batch: int = 256) -> steer.Adapted:
    """Tune the toy's tiny network by the transport objective."""
    base = Corrected(steer.GaussianMixture(torch.zeros(1, 1), 1.0))
    return steer.finetune(
        base, bump, None, "transport", steps, temperature=1 / LAMBDA, seed=seed, rank=32,
        batch_size=batch, learning_rate=5e-3, progress=False, precision="32-true",
        accelerator="cpu",
    )  # fmt: skip


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    print("transport optimum", transport_optimum())
    for seed in range(args.seeds):
        start = time.perf_counter()
        tuned = transport(args.steps, seed)
        took = time.perf_counter() - start
        jumps = [round(mean_reward(tuned, k), 4) for k in (1, 2, 4, 8)]
        print(seed, "E r by 1, 2, 4, 8 jumps", jumps, "by velocity, J", objective(tuned), took)


if __name__ == "__main__":
    main()
