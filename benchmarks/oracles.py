"""Every method that claims the tilt against closed forms.

python -m benchmarks.oracles

Of each method, problem and number of steps: `Z_hat / Z` with its standard error over 32
populations of 256 particles, and the root mean square error of weighted means of x, over that of
exact samples of the same size. `ess` is that of plain importance sampling, a share of the sample.
"""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import steer
from recipes.figures import markdown
from steer.path import step_times
from steer.reward import wrap
from steer.sampling.methods import TABLE

METHODS = {
    "noise-smc": {},
    "noise-smc (pcn)": {"move": "pcn", "moves": 2},
    "split": {},
    "split (least)": {"least": 0.7},
    "renoise": {},
    "renoise (least)": {"least": 0.7},
    "tds": {},
    "das": {},
    "fk-difference": {},
}
RUNS, PARTICLES = 32, 256


class Problem(NamedTuple):
    """A mixture, a reward over its temperature, and what is known of the tilt."""

    flow: steer.GaussianMixture
    reward: Callable[[Tensor], Tensor]
    log_z: float
    mean: Tensor
    deviation: Tensor
    ess: float


def mixture(d: int) -> steer.GaussianMixture:
    """Three modes that differ in the first two coordinates."""
    means = torch.zeros(3, d)
    means[:, :2] = torch.tensor([[-1.0, 0.0], [1.0, 0.5], [0.0, 1.2]])
    return steer.GaussianMixture(
        means, torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.5, 0.3, 0.2])
    )


def closed(flow: steer.GaussianMixture, reward: steer.Reward, temperature: float) -> Problem:
    """A problem whose tilt is a mixture again."""
    q, log_z = flow.tilt(reward, temperature)
    twice = flow.tilt(reward, temperature / 2)[1]
    mean = q.weights @ q.means
    gap = q.means - mean
    variance = q.weights @ (q.covariances.diagonal(dim1=1, dim2=2) + gap.square())
    ess = math.exp(2 * float(log_z) - float(twice))
    return Problem(
        flow, lambda x: reward(x, None) / temperature, float(log_z), mean, variance.sqrt(), ess
    )


def drawn(flow: steer.GaussianMixture, reward: Callable[[Tensor], Tensor]) -> Problem:
    """A problem whose tilt is known by four million weighted draws."""
    g = torch.Generator().manual_seed(9)
    x = flow.sample(4_000_000, g)
    log_w = reward(x).double()
    w = log_w.softmax(0)
    mean = w @ x.double()
    variance = w @ (x.double() - mean).square()
    log_z = float(log_w.logsumexp(0)) - math.log(len(x))
    return Problem(
        flow, reward, log_z, mean, variance.sqrt(), float(1 / w.square().sum()) / len(x)
    )


def problems() -> dict[str, Problem]:
    """The problems by name."""
    found = {}
    for d in (2, 16, 64):
        flow, a = mixture(d), torch.zeros(d)
        a[:2] = torch.tensor([1.0, 0.3])
        found[f"linear, d={d}"] = closed(flow, steer.LinearReward(a), 0.6)
        centre, precision = torch.zeros(d), torch.zeros(d, d)
        centre[:2] = torch.tensor([8.0, 2.4])
        precision[:2, :2] = torch.eye(2)
        found[f"quadratic, d={d}"] = closed(flow, steer.QuadraticReward(centre, precision), 3.4)
    far = torch.tensor([1.0, 0.3])
    found["linear, cold, d=2"] = closed(mixture(2), steer.LinearReward(far), 0.25)
    found["kinked, d=2"] = drawn(
        mixture(2), lambda x: -2.5 * (x[:, :2] - torch.tensor([1.5, 1.0]).to(x)).abs().sum(1)
    )
    unequal = steer.GaussianMixture(
        torch.tensor([[-3.0, 0.0], [3.0, 0.0]]), 0.3, torch.tensor([0.999, 0.001])
    )
    found["modes 1:1000, d=2"] = closed(unequal, steer.LinearReward(torch.tensor([1.0, 0.0])), 0.5)
    return found


def measured(name: str, problem: Problem, steps: int) -> tuple[float, float, float]:
    """Return the mean of Z_hat / Z, its standard error, and the error of means over exact ones."""
    method, options = name.split(" ")[0], METHODS[name]
    d = problem.flow.event_shape[0]
    x = torch.randn(RUNS, PARTICLES, d, generator=torch.Generator().manual_seed(steps))
    sampler = TABLE[method].build(
        problem.flow, wrap(problem.reward), None, 1.0, step_times(steps), **options
    )
    *_, end = sampler.steps(x, 1)
    ratio = (end.log_z.double() - problem.log_z).exp()
    means = (end.log_w.softmax(-1)[..., None] * end.x).sum(1).double()
    off = ((means - problem.mean) / problem.deviation)[:, :2]  # the reward sees these two
    return (
        float(ratio.mean()),
        float(ratio.std()) / RUNS**0.5,
        float(off.square().mean().sqrt()) * PARTICLES**0.5,
    )


def main() -> None:
    """Print the table, and write it where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 25])
    parser.add_argument("--only", default="", help="part of a problem's name")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for title, problem in problems().items():
        if args.only not in title:
            continue
        for name in METHODS:
            cells = []
            for steps in args.steps:
                z, error, off = measured(name, problem, steps)
                right = abs(z - 1) < 4 * error + 0.01
                cells.append(f"{z:.3f} ± {error:.3f}{'' if right else ' !'}, {off:.1f} x")
            rows.append([title, f"{problem.ess:.1%}", name, *cells])
            print(*rows[-1], flush=True)
    head = ["problem", "ess", "method", *(f"{s} steps" for s in args.steps)]
    text = markdown(head, rows)
    if args.out is not None:
        args.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
