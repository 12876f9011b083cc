"""Cost of a guided `fmtt` step relative to the bare calls it needs.

Bare: one velocity, one lookahead forward and backward, one decode, one reward forward and
backward. Steps and bare calls are interleaved in one process, at the same times and rows; the
figure is the median of their ratios. Then: four prompts in one batch against four runs. Run it
with the machine otherwise idle:

    python -m benchmarks.step
"""

import argparse
import statistics
import time

import torch

import rewards
import steer
from steer.devices import differentiating
from steer.noise import Noise


def bare(
    flow: steer.FlowMap, reward: steer.Reward, x: torch.Tensor, t: float, prompt: str | None = None
) -> None:
    """Make only the calls that a guided step needs: where one prediction is both, no velocity."""
    if not flow.reuses(t, 1.0):
        with torch.no_grad():
            flow.velocity(x, t)
    x = x.detach().requires_grad_()
    with differentiating():
        images = flow.decode(flow.lookahead(x, t)).float()
        scores = reward(images, None if prompt is None else [prompt] * len(x))
        torch.autograd.grad(scores.sum(), x)


def measure(
    particles: int, repeats: int, model: str = "emoji", spec: str = "clip"
) -> tuple[float, float, float]:
    """Return the median ratio, and the quartiles of the ratios."""
    prompt = "a red apple"
    flow, reward = steer.load(model).given([prompt]), rewards.load(spec)
    potential = steer.Lookahead(flow, reward, [prompt], temperature=0.05)
    guide = steer.Guidance(potential, steer.Sde(flow), steer.Continuous(), scale=1.0)
    ratios = []
    for seed in range(repeats):
        x = Noise(seed, particles=particles).normal(flow.event_shape)
        run = guide.steps(x, seed)
        next(run)  # the first step also evaluates at t = 0
        for t in guide.times[2:-1]:  # the last one has no lookahead
            start = time.perf_counter()
            population = next(run)
            middle = time.perf_counter()
            bare(flow, reward, population.x, t, prompt)
            ratios.append((middle - start) / (time.perf_counter() - middle))
    low, _, high = statistics.quantiles(ratios, n=4)
    return statistics.median(ratios), low, high


def batching(repeats: int, model: str = "emoji", spec: str = "clip") -> tuple[float, float, float]:
    """Return the time of 4 prompts x 4 particles in one batch, over that of four runs of one.

    Median and quartiles of the ratios of interleaved pairs.
    """
    flow, reward = steer.load(model), rewards.load(spec)
    prompts = ["red apple", "cat", "face", "pizza"]

    def seconds(groups: list[list[str]], seed: int) -> float:
        start = time.perf_counter()
        for group in groups:
            steer.sample(flow, reward, group, 4, 4, temperature=0.05, seed=seed)
        return time.perf_counter() - start

    ratios = [
        seconds([prompts], seed) / seconds([[p] for p in prompts], seed)
        for seed in range(repeats + 1)
    ][1:]  # the first is a warm-up
    low, _, high = statistics.quantiles(ratios, n=4)
    return statistics.median(ratios), low, high


def main() -> None:
    """Print the ratio for a few population sizes, and what batching prompts saves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--particles", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--repeats", type=int, default=8)
    args = parser.parse_args()
    print("| particles | guided step / bare calls, median (quartiles) |\n|---|---|")
    for particles in args.particles:
        measure(particles, 1)
        ratio, low, high = measure(particles, args.repeats)
        print(f"| {particles} | {ratio:.3f} ({low:.3f} to {high:.3f}) |")
    ratio, low, high = batching(args.repeats)
    print(
        f"\n4 prompts x 4 particles, one batch / four runs: {ratio:.3f} ({low:.3f} to {high:.3f})"
    )


if __name__ == "__main__":
    main()
