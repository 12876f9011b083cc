"""The claims of DAS (Kim, Kim and Park 2025, arXiv 2501.05803), on a mixture in closed form.

It claims to sample the tilt with few particles and without over-optimisation. Each of 512 runs
ends with one sample by its weights; it is compared with guidance without weights (`dps`).
"""

import torch

import steer
from benchmarks.oracles import mixture
from benchmarks.published.figure import Figure, drawn, mean
from steer.path import step_times
from steer.sampling.methods import TABLE

NOTE = (
    "The publication's tables are of pictures (Stable Diffusion), which no CPU reproduces, and "
    "its mixture has no public numbers: mixture, reward and temperature are assumed, those of "
    "`benchmarks.oracles` (linear, d = 2). Published defaults: γ = .008, 100 steps, ESS .5, 4 to "
    "16 particles."
)
TEMPERATURE, STEPS, RUNS = 0.6, 100, 512


def problem() -> tuple[steer.GaussianMixture, steer.LinearReward]:
    """Return mixture and reward."""
    return mixture(2), steer.LinearReward(torch.tensor([1.0, 0.3]))


def exact() -> tuple[float, float]:
    """Return mean and standard deviation of the reward under the tilt."""
    flow, reward = problem()
    q, _ = flow.tilt(reward, TEMPERATURE)
    a = reward.a.double()
    means = q.means @ a
    middle = q.weights @ means
    spread = q.weights @ ((q.covariances @ a) @ a + (means - middle).square())
    return float(middle), float(spread.sqrt())


def one_each(particles: int, runs: int = RUNS, steps: int = STEPS) -> torch.Tensor:
    """Return one sample of each run, by its weights, (runs, 2)."""
    flow, reward = problem()
    g = torch.Generator().manual_seed(particles)
    x = torch.randn(runs, particles, 2, generator=g)
    sampler = TABLE["das"].build(flow, reward, None, TEMPERATURE, step_times(steps))
    *_, end = sampler.steps(x, 1)
    chosen = torch.multinomial(end.log_w.softmax(-1), 1, generator=g)
    return end.x.gather(1, chosen[..., None].expand(-1, -1, 2))[:, 0]


def figures(runs: int = RUNS, steps: int = STEPS) -> list[Figure]:
    """Return mean reward and its spread: DAS by number of particles, and gradient ascent."""
    flow, reward = problem()
    wanted, deviation = exact()
    sets = {f"das, n = {n}": one_each(n, runs, steps) for n in (1, 4, 16)}
    sets["dps"] = drawn("dps", flow, reward, TEMPERATURE, steps, runs)
    made = []
    for name, x in sets.items():
        r = reward(x, None)
        made += [
            mean(f"E r, {name}", wanted, r, "closed form"),
            Figure(f"sd of r, {name}", deviation, float(r.std()), source="closed form"),
        ]
    return made
