"""Whether each weighted method's estimate of Z is unbiased, on a problem whose Z is known.

    python -m benchmarks.evidence

A standard Gaussian in two dimensions and a linear reward; the methods' defaults at a few numbers
of steps. The mean of `Z_hat / Z` over seeded replicates and its standard error are printed.
"""

import torch

import steer
from recipes.figures import Estimate, estimate, markdown

__all__ = ["main", "ratio"]

PARTICLES, REPLICATES = 64, 400
STEPS = (5, 10, 20, 40)
METHODS = ("fmtt", "denoiser", "split")


def ratio(method: str, steps: int, replicates: int = REPLICATES, **options: float) -> Estimate:
    """Return the mean of Z_hat / Z over replicates, and its standard error.

    Args:
        method: its name.
        steps: of the run.
        replicates: number of replicates.
        **options: the method's own.
    """
    flow = steer.GaussianMixture(torch.zeros(1, 2), 1.0)
    reward, temperature = steer.LinearReward([1.0, 0.3]), 0.6
    exact = flow.tilt(reward, temperature)[1]
    found = steer.sample(
        flow, reward, [""] * replicates, PARTICLES, steps, method, temperature, batch_size=10**9,
        **options,
    )  # fmt: skip
    assert found.log_z is not None
    return estimate((found.log_z.double() - exact).exp())


def main() -> None:
    """Print the table."""
    rows = [[name, *(str(ratio(name, k)) for k in STEPS)] for name in METHODS]
    print(markdown(["Z_hat / Z", *(f"{k} steps" for k in STEPS)], rows))


if __name__ == "__main__":
    main()
