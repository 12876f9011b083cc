"""Every combination of parts against closed forms: Z and the means under the tilt.

The bound on the standard error gives the test its power. Temperatures are such that plain
importance sampling has an effective sample size of 5 to 10 %.
"""

import math

import pytest
import torch

import steer
from steer.guidance.kernel import Jump, Langevin, Sde

slow = pytest.mark.slow

RUNS = 32


def problem(d, kind):
    """Return a mixture, a reward and a temperature; the first two coordinates tell all."""
    means = torch.zeros(3, d)
    means[:, :2] = torch.tensor([[-1.0, 0.0], [1.0, 0.5], [0.0, 1.2]])
    flow = steer.GaussianMixture(
        means, torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.5, 0.3, 0.2])
    )
    if kind == "linear":
        a = torch.zeros(d)
        a[:2] = torch.tensor([1.0, 0.3])
        return flow, steer.LinearReward(a), 0.6
    centre, precision = torch.zeros(d), torch.zeros(d, d)
    centre[:2] = torch.tensor([8.0, 2.4])
    precision[:2, :2] = torch.eye(2)
    return flow, steer.QuadraticReward(centre, precision), 3.4


# name -> kernel, scale, threshold, particles in all, bound on the standard error of Z
CASES = {
    "jump": (lambda f: Jump(f, 0.0), 0.0, 0.0, 49_152, 0.02),
    "jump, churn .5": (lambda f: Jump(f, 0.5), 0.0, 0.0, 49_152, 0.02),
    "jump, churn 1": (lambda f: Jump(f, 1.0), 0.0, 0.0, 49_152, 0.02),
    "jump, resampled": (lambda f: Jump(f, 0.0), 0.0, 0.5, 32_768, 0.08),
    "jump, churn .5, resampled": (lambda f: Jump(f, 0.5), 0.0, 0.5, 32_768, 0.08),
    "jump, churn 1, resampled": (lambda f: Jump(f, 1.0), 0.0, 0.5, 32_768, 0.08),
    "jump, churn .5, scale 1": (lambda f: Jump(f, 0.5), 1.0, 0.5, 32_768, 0.08),
    "jump, churn .5, scale 2": (lambda f: Jump(f, 0.5), 2.0, 0.5, 32_768, 0.08),
    "jump, churn 1, scale 1": (lambda f: Jump(f, 1.0), 1.0, 0.5, 32_768, 0.08),
    "jump, churn 1, scale 2": (lambda f: Jump(f, 1.0), 2.0, 0.5, 32_768, 0.08),
    "langevin": (Langevin, 0.0, 0.5, 16_384, 0.02),
}
QUICK = [
    pytest.param(name, 2, kind, 10, id=f"{name}, {kind}") for name in CASES
    for kind in ("linear", "quadratic")
]  # fmt: skip
SLOW = [
    pytest.param(name, d, kind, steps, id=f"{name}, {kind}, d={d}, {steps} steps", marks=slow)
    for name in CASES
    for kind in ("linear", "quadratic")
    for d, steps in ((2, 25), (16, 10), (16, 25))
]


@pytest.mark.parametrize("kind", ["linear", "quadratic"])
@pytest.mark.parametrize("d", [2, 16])
def test_the_problems_are_hard(d, kind):
    """Plain importance sampling has ESS / N = Z(R)² / Z(2 R), in closed form."""
    flow, reward, temperature = problem(d, kind)
    once, twice = (float(flow.tilt(reward, temperature / k)[1]) for k in (1, 2))
    assert 0.05 < math.exp(2 * once - twice) < 0.10


def replicates(flow, reward, temperature, kernel, steps, scale, threshold, total, runs=RUNS):
    """Run `runs` populations at once, as prompts: they share nothing but the call."""
    n = total // runs
    g = torch.Generator().manual_seed(steps)
    x0 = torch.randn(runs, n, *flow.event_shape, generator=g)
    times = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    guide = steer.Guidance(
        steer.Lookahead(flow, reward, temperature=temperature),
        kernel(flow),
        times=times,
        scale=scale,
        threshold=threshold,
    )
    return guide(x0, seed=1)


@pytest.mark.parametrize(("name", "d", "kind", "steps"), [*QUICK, *SLOW])
def test_evidence_and_means_are_exact(name, d, kind, steps):
    kernel, scale, threshold, total, bound = CASES[name]
    flow, reward, temperature = problem(d, kind)
    tilt, log_z = flow.tilt(reward, temperature)
    last = replicates(flow, reward, temperature, kernel, steps, scale, threshold, total)
    ratio = (last.log_z.double() - log_z).exp()
    error = float(ratio.std()) / RUNS**0.5
    assert error <= bound
    assert abs(float(ratio.mean()) - 1) < 4 * error
    # E[Z_hat (mean_hat - E_q x)] = 0: without the bias of a ratio
    mean = (last.log_w.softmax(-1)[..., None] * last.x).sum(1).double()
    off = ratio[:, None] * (mean - (tilt.weights[:, None] * tilt.means).sum(0))
    spread = off.std(0) / RUNS**0.5
    # of some thousand numbers in all cases one is off by four standard errors, by chance
    assert (off.mean(0).abs() < 5 * spread).all()
    assert (spread < 2 * bound).all()


@slow
def test_the_euler_chain_is_biased_in_proportion_to_its_step():
    """`Sde` with `Ratio` is exact for the Euler chain's law, whose own error is O(step)."""
    flow = steer.GaussianMixture(
        torch.tensor([[-2.0], [0.5], [2.0]]), 0.25, torch.tensor([0.4, 0.35, 0.25])
    )
    reward = steer.LinearReward(torch.tensor([0.5]))
    _, log_z = flow.tilt(reward)
    counts = torch.tensor([5, 10, 20, 40])
    biases = []
    for steps in counts.tolist():
        guide = steer.Guidance(
            steer.Terminal(flow, reward),  # scale 0, no resampling: the weights telescope
            Sde(flow),
            times=torch.linspace(0, 1, steps + 1, dtype=torch.float64),
            threshold=0.0,
        )
        chunks = []
        for chunk in range(8):
            g = torch.Generator().manual_seed(100 * steps + chunk)
            last = guide(torch.randn(2**17, 1, generator=g), seed=chunk)
            chunks.append(last.log_z.double())
        biases.append(torch.stack(chunks).logsumexp(0) - torch.tensor(8.0).log() - log_z)
    bias = torch.stack(biases).abs().log()
    x = -counts.double().log()
    slope = ((x - x.mean()) * (bias - bias.mean())).sum() / (x - x.mean()).square().sum()
    assert abs(float(slope) - 1) < 0.3
