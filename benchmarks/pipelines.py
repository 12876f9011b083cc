"""Cost of a guided `fmrg-j` step of a diffusers pipeline, relative to its bare calls.

Bare: the denoiser and the autoencoder called directly on prepared arguments, forward and backward
through denoiser, decoder and reward, and one forward of the denoiser for the jump. Steps and bare
calls are interleaved in one process; the figure is the median of their ratios. The pipelines have
the real classes with small random weights. Run it on an otherwise idle machine:

    python -m benchmarks.pipelines
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

import steer
from steer.backends.pipeline import PipelineFlow
from steer.devices import differentiating
from tests.tiny_flows import flow


def red(images: Tensor) -> Tensor:
    """Return how red pictures are, (n,)."""
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


def bare_calls(one: PipelineFlow, particles: int) -> Callable[[Tensor], None]:
    """Return a function that makes only the calls of a step, by hand."""
    (rows,) = one._arguments(particles, torch.device("cpu"))
    network, vae, codec = one.network, one.vae, one.codec
    time_now = torch.full((particles,), 0.5 * one.time_scale)
    end = torch.zeros(particles)
    state, told = one.state_argument, one.time_argument

    def call(x: Tensor) -> Tensor:
        with one._told(time_now, end):  # does nothing, except for a second time
            return network(**{state: x, told: time_now}, **rows.prompt, return_dict=False)[0]

    def step(x: Tensor) -> None:
        with differentiating():
            x = x.detach().requires_grad_()
            y = x + 0.5 * call(x)
            images = vae.decode(codec.to_vae(y), return_dict=False)[0] * 0.5 + 0.5
            torch.autograd.grad(red(images.clamp(0, 1)).sum(), x)
        with torch.no_grad():
            call(x)

    return step


def ratio(
    one: PipelineFlow, particles: int, steps: int, repeats: int
) -> tuple[float, float, float]:
    """Return the median of the ratios, and their quartiles."""
    one.requires_grad_(False)  # the bare calls in their fastest form
    bare = bare_calls(one.given(["a fox"]), particles)
    ratios = []
    for seed in range(repeats):
        run = steer.stream(
            one, red, prompts=["a fox"], method="fmrg-j", steps=steps, particles=particles,
            seed=seed,
        )  # fmt: skip
        next(run)
        for _ in range(steps - 2):
            start = time.perf_counter()
            population = next(run)
            middle = time.perf_counter()
            bare(population.x.flatten(0, 1))
            ratios.append((middle - start) / (time.perf_counter() - middle))
    low, _, high = statistics.quantiles(ratios, n=4)
    return statistics.median(ratios), low, high


def main() -> None:
    """Print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pipelines", nargs="+", default=["flux", "sdxl"])
    parser.add_argument("--particles", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=8)
    args = parser.parse_args()
    print("| pipeline | particles | guided step / bare calls, median (quartiles) |\n|---|---|---|")
    for name in args.pipelines:
        for particles in args.particles:
            ratio(flow(name), particles, args.steps, 1)
            middle, low, high = ratio(flow(name), particles, args.steps, args.repeats)
            print(f"| {name} | {particles} | {middle:.3f} ({low:.3f} to {high:.3f}) |")


if __name__ == "__main__":
    main()
