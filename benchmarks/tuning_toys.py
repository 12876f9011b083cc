"""Tuning on toys whose base is exact: reward gained against reward calls.

`python -m benchmarks.tuning_toys --free` compares the objectives that need no reward gradient with
`Direct(jumps=(1,), anchor=1)` on two toys:

- `bump`: the published one on the line (arXiv 2609.27033), N(0, 1), a linear path, reward
  `exp(-(y - 4.75)² / (2 2.25²))`, temperature 1/7;
- `slope`: two Gaussians in the plane and a linear reward, temperature 1.

The objectives have different optima: `Direct` has a transport cost for each sample, the others a
divergence penalty. The comparison is of the mean reward of plain samples minus that of the base.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

import steer
from steer.adapters.inject import adapt
from steer.adapters.lora import Adapted
from steer.noise import Draws
from steer.objectives.batch import Batch, Objective
from steer.objectives.direct import Direct
from steer.objectives.grpo import GRPO
from steer.objectives.nft import NFT
from steer.path import Time, like
from steer.reward import Reward, wrap
from steer.testing import Corrected
from steer.training.average import follow


@dataclass(frozen=True)
class Toy:
    """A base in closed form, a reward on it, and a temperature."""

    base: steer.FlowMap
    reward: Reward
    temperature: float


class StandardNormal(steer.FlowMap):
    """The flow map of N(0, 1) data on the line: `X(s,t,x) = x c_t / c_s`, `c² = alpha² + beta²`.

    It equals that of `GaussianMixture`, without its integration.
    """

    def __init__(self) -> None:
        super().__init__()
        self.path, self.event_shape = steer.Linear(), (1,)

    def velocity(self, x: torch.Tensor, t: Time) -> torch.Tensor:
        """Return `x c'_t / c_t`."""
        alpha, beta = self.path(t)
        return like((beta - alpha) / (alpha**2 + beta**2), x) * x

    def jump(self, x: torch.Tensor, s: Time, t: Time) -> torch.Tensor:
        """Return `x c_t / c_s`."""
        (alpha_s, beta_s), (alpha_t, beta_t) = self.path(s), self.path(t)
        return like(torch.hypot(alpha_t, beta_t) / torch.hypot(alpha_s, beta_s), x) * x


def bump() -> Toy:
    """Return the published toy on the line: E r is .1421, under the exponential tilt .3669."""
    flow = StandardNormal()
    f = wrap(lambda x: torch.exp(-((x[:, 0] - 4.75) ** 2) / (2 * 2.25**2)))
    return Toy(flow, f, 1 / 7)


def slope() -> Toy:
    """Return two Gaussians in the plane with a linear reward across them."""
    flow = steer.GaussianMixture(torch.tensor([[-1.5, 0.0], [1.5, 0.5]]), 0.3)
    return Toy(flow, steer.LinearReward(torch.tensor([0.8, 0.4])), 1.0)


TOYS: dict[str, Callable[[], Toy]] = {"bump": bump, "slope": slope}
GRADIENT: Callable[[], Objective] = lambda: Direct(jumps=(1,), anchor=1.0)  # noqa: E731
FREE: dict[str, Callable[[], Objective]] = {
    "nft": NFT,
    "nft, kl 1": lambda: NFT(kl=1.0),
    "grpo": GRPO,
    "grpo, kl 1": lambda: GRPO(kl=1.0),
}


def tune(
    toy: Toy,
    objective: Objective,
    steps: int,
    rows: int = 32,
    *,
    lr: float = 1e-3,
    decay: float = 0.98,
    every: int = 0,
    seed: int = 0,
) -> tuple[Adapted, list[tuple[int, float]]]:
    """Tune a network on the toy's base; return it, and (reward calls, gain) along the way.

    AdamW is used on the adapters, with a running average. A reward call is the reward of one
    sample. The gain is that of the average's one-jump samples, with the same noise as the base's.

    Args:
        toy: the toy.
        objective: the objective.
        steps: optimizer steps.
        rows: samples of a batch, all of one prompt.
        lr: the learning rate.
        decay: maximum decay of the running average; it starts lower.
        every: steps between measurements of the gain; 0: only at the end.
        seed: fixes the adapters and the noise.
    """
    student = adapt(Corrected(toy.base, seed=seed), rank=16, seed=seed)
    student.add("average")
    average = student.at(adapter="average")
    parameters = list(student.adapters().values())
    slow = list(student.adapters("average").values())
    for p in parameters:
        p.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
    curve = []
    for step in range(steps):
        batch = Batch(
            student, student.base, average, toy.reward, toy.temperature,
            Draws(seed, step, (0, rows)),
        )  # fmt: skip
        optimizer.zero_grad()
        objective(batch)["loss"].backward()
        optimizer.step()
        follow(slow, parameters, decay, step)
        if (step + 1) % (every or steps) == 0:
            curve.append(((step + 1) * rows, gain(toy, average)))
    return student, curve


@torch.no_grad()
def gain(toy: Toy, flow: steer.FlowMap, jumps: int = 1, n: int = 1024) -> float:
    """Return the mean reward of the flow's samples minus the base's, for the same noise."""
    x_0 = torch.randn(n, *flow.event_shape, generator=torch.Generator().manual_seed(7))
    x = x_0
    for k in range(jumps):
        x = flow.jump(x, k / jumps, (k + 1) / jumps)
    return float((toy.reward(x) - toy.reward(toy.base.jump(x_0, 0.0, 1.0))).mean())


def table(steps: int = 100, seeds: Sequence[int] = (0, 1)) -> Iterator[str]:
    """Run everything, and yield the lines: `Direct` gets `steps`, the others ten times as many.

    "Calls to 80 %" is the number of calls after which the gain first reaches 80 % of `Direct`'s
    final gain.
    """
    yield "| toy | objective | reward calls | gain | share | calls to 80 % | gain in 4 jumps |"
    yield "|---|---|---|---|---|---|---|"
    for name, make in TOYS.items():
        toy = make()
        goal = None
        for rule, build in {"direct": GRADIENT, **FREE}.items():
            length = steps if goal is None else 10 * steps
            runs = [tune(toy, build(), length, every=length // 20, seed=s) for s in seeds]
            curve = [
                (points[0][0], sum(g for _, g in points) / len(seeds))
                for points in zip(*(c for _, c in runs), strict=True)
            ]
            calls, last = curve[-1]
            goal = last if goal is None else goal
            reached = next((str(c) for c, g in curve if g >= 0.8 * goal), "never")
            four = sum(gain(toy, s.at(adapter="average"), 4) for s, _ in runs) / len(seeds)
            yield (
                f"| {name} | {rule} | {calls} | {last:.3f} | {last / goal:.0%} | {reached} | "
                f"{four:.3f} |"
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--free", action="store_true", help="the objectives without gradients")
    parser.add_argument("--steps", type=int, default=100, help="of the gradient's run")
    parser.add_argument("--seeds", type=int, default=2, help="runs of each, averaged")
    arguments = parser.parse_args()
    if not arguments.free:
        parser.error("say what to measure: --free")
    for line in table(arguments.steps, range(arguments.seeds)):
        print(line, flush=True)
