"""The published toys of flow-map trajectory tilting, with their published figures.

`python -m benchmarks.toys` prints two tables: the tilt of a mixture on the line by the published
scheme, and the ring of eight modes (Sabour et al. 2025, arXiv 2511.22688).
"""

import math

import torch

import steer

EXACT_LINE = {"P(x > 1)": 0.7235, "E r": 1.5602, "log Z": 0.9870}
VIEWS = {"flow map": steer.Lookahead, "denoiser": steer.Denoised, "naive": steer.Naive}
NOISE = {"flow map": 1.5, "denoiser": 1.0, "naive": 1.5}
PUBLISHED = {  # share of x_a > 0, mean reward: without resampling, with one
    "flow map": ((0.694, -0.67), (0.830, -0.13)),
    "denoiser": ((0.606, -1.95), (0.799, -0.20)),
    "naive": ((0.533, -3.73), (0.612, -2.75)),
}


def mixture() -> steer.GaussianMixture:
    """Return the mixture on the line."""
    means = torch.tensor([[-2.0], [0.5], [2.0]])
    return steer.GaussianMixture(means, 0.25, torch.tensor([0.4, 0.35, 0.25]))


def tanh_reward(x: torch.Tensor) -> torch.Tensor:
    """Return `2 tanh x`."""
    return 2 * torch.tanh(x[:, 0])


def quadrature() -> dict[str, float]:
    """Return the exact values under the tilt, by the trapezoid rule on [-8, 8]."""
    x = torch.linspace(-8, 8, 200_001, dtype=torch.float64)[:, None]
    log_q = mixture().log_prob(x) + tanh_reward(x)
    z = torch.trapezoid(log_q.exp(), x[:, 0])
    q = log_q.exp() / z
    above = torch.trapezoid(q * (x[:, 0] > 1), x[:, 0])
    mean = torch.trapezoid(q * tanh_reward(x), x[:, 0])
    return {"P(x > 1)": float(above), "E r": float(mean), "log Z": float(z.log())}


def line(particles: int = 40_000, steps: int = 400) -> tuple[dict[str, float], dict[str, float]]:
    """Run the published scheme once, weights only, and return estimates and standard errors.

    The errors are those of a weighted mean of independent particles.
    """
    flow = mixture()
    guide = steer.Guidance(
        steer.Lookahead(flow, tanh_reward),
        steer.Sde(flow),
        steer.Continuous(),
        times=torch.linspace(0, 1, steps + 1, dtype=torch.float64),
        scale=1.0,
        threshold=0.0,
    )
    x0 = torch.randn(particles, 1, generator=torch.Generator().manual_seed(0))
    last = guide(x0, seed=0)
    w = last.log_w.double().softmax(0)
    found, errors = {"log Z": float(last.log_z)}, {}
    values = {"P(x > 1)": (last.x[:, 0] > 1).double(), "E r": last.reward.double()}
    for name, f in values.items():
        found[name] = float((w * f).sum())
        errors[name] = float((w * (f - found[name])).square().sum().sqrt())
    v = (last.log_w - last.log_z).exp()
    errors["log Z"] = float(v.std()) / particles**0.5
    return found, errors


def ring_reward(x: torch.Tensor) -> torch.Tensor:
    """Return `-x_a²` where the first coordinate is below zero."""
    return -x[:, 0].clamp(max=0).square()


def ring_guide(view: str, times: torch.Tensor) -> steer.Guidance:
    """Return the published scheme on the ring of eight modes, without resampling."""
    angles = torch.arange(8) * (math.pi / 4)
    flow = steer.GaussianMixture(4.7 * torch.stack([angles.cos(), angles.sin()], 1), 0.3)
    eps = NOISE[view]
    return steer.Guidance(
        VIEWS[view](flow, ring_reward),
        steer.Sde(flow, noise=lambda t: eps * (1 - t)),
        steer.Continuous(),
        times=times,
        scale=1.0,
        threshold=0.0,
    )


def ring(view: str, seeds: int = 10, particles: int = 2500) -> dict[str, dict[str, float]]:
    """Return the unweighted share of x_a > 0, the mean reward and ESS / n, over seeds.

    Without resampling ("no"), and with one at t = .5 ("once"): both have the first half in common.
    """
    times = torch.linspace(0, 1, 101, dtype=torch.float64)
    x0 = torch.randn(seeds, particles, 2, generator=torch.Generator().manual_seed(0))
    for k, last in enumerate(ring_guide(view, times).steps(x0, seed=0)):
        if k == 49:
            g = torch.Generator().manual_seed(1)
            pairs = zip(last.x, last.log_w, strict=True)
            half = torch.stack([x[steer.systematic(log_w, g)] for x, log_w in pairs])
    return {"no": _figures(last), "once": _figures(ring_guide(view, times[50:])(half, seed=1))}


def _figures(last: steer.Population) -> dict[str, float]:
    share = (last.x[..., 0] > 0).double().mean(1)
    return {
        "share": float(share.mean()),
        "error": float(share.std()) / len(share) ** 0.5,
        "reward": float(last.reward.mean()),
        "ess": float(last.ess.mean()) / last.log_w.shape[1],
    }


def main() -> None:
    """Print both tables."""
    found, errors = line()
    print("| line | exact | found | standard error |\n|---|---|---|---|")
    for name, exact in EXACT_LINE.items():
        print(f"| {name} | {exact:.4f} | {found[name]:.4f} | {errors[name]:.4f} |")
    print("\n| ring | resampled | share | published | reward | published | ESS / n |")
    print("|---|---|---|---|---|---|---|")
    found_ring = {view: ring(view) for view in VIEWS}
    for i, resampled in enumerate(("no", "once")):
        for view, published in PUBLISHED.items():
            r = found_ring[view][resampled]
            share, reward = published[i]
            print(
                f"| {view} | {resampled} | {r['share']:.3f} ± {r['error']:.3f} | {share:.3f} | "
                f"{r['reward']:.2f} | {reward:.2f} | {r['ess']:.2f} |"
            )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
