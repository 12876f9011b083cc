"""The exact tilt of a mixture: the reference for the methods of `steer compare`."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from recipes.figures import Estimate, estimate, markdown
from steer.exact import GaussianMixture
from steer.guidance.resampler import ess, log_mean_exp, multinomial
from steer.reward import LinearReward, QuadraticReward, Reward

__all__ = ["exact_tilts", "tilt_table"]

SAMPLES = 1 << 15
STRENGTHS = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
LEAST = 1000.0  # effective sample size below which an importance-weighted row is left out


def exact_tilts(
    flow: GaussianMixture,
    reward: Reward,
    measure: Callable[[Tensor], Mapping[str, Tensor]],
    temperatures: Iterable[float] = (),
) -> list[dict[str, Any]]:
    """Measure samples of `q_T = p exp(R / T) / Z` over a range of temperatures.

    `q_T` has the highest mean reward of all laws at its Kullback-Leibler divergence from p, so its
    curve is what a method that claims the tilt should lie on. It is sampled in closed form where
    `GaussianMixture.tilt` knows it, and by importance resampling of samples of p otherwise.

    Args:
        flow: the mixture p.
        reward: R.
        measure: samples (n, d) -> "reward" (n,), "features" (n, f) and perhaps "judge" (n,).
        temperatures: which to measure beside those of `STRENGTHS`, the standard deviation of R
            under p over T.

    Returns:
        A row for p itself, then one a temperature, from high to low: "temperature" (None for p),
        "strength", "reward", "judge" and "diversity" as `Estimate`, "kl" = KL(q_T | p) in nats,
        "ess", the effective sample size. Rows whose importance weights leave fewer than `LEAST`
        samples are left out.
    """
    base = flow.sample(SAMPLES, torch.Generator().manual_seed(0)).to(flow.means.device)
    measured = measure(base)
    values = measured["reward"].double()
    scale = float(values.std())
    rows = [{"temperature": None, "strength": 0.0, "kl": 0.0, "ess": float(SAMPLES)}
            | _estimates(measured, SAMPLES)]  # fmt: skip
    if not scale > 0:  # a constant reward, or NaN, does not tilt
        return rows
    asked = {float(t) for t in temperatures if t} | {scale / s for s in STRENGTHS}
    for temperature in sorted(asked, reverse=True):
        if isinstance(reward, LinearReward | QuadraticReward):
            tilted, log_z = flow.tilt(reward, temperature)
            samples = tilted.sample(SAMPLES, torch.Generator().manual_seed(1)).to(base)
            log_evidence, size = float(log_z), float(SAMPLES)
        else:
            log_w = values / temperature
            log_evidence, size = float(log_mean_exp(log_w)), float(ess(log_w))
            if not size >= LEAST:
                continue
            samples = base[multinomial(log_w, torch.Generator().manual_seed(1))]
        estimates = _estimates(measure(samples), size)
        mean = estimates["reward"].mean
        assert mean is not None
        rows.append(
            {"temperature": temperature, "strength": scale / temperature,
             "kl": mean / temperature - log_evidence, "ess": size} | estimates
        )  # fmt: skip
    return rows


def _estimates(measured: Mapping[str, Tensor], size: float) -> dict[str, Estimate]:
    """Return means with standard errors, which account for the effective sample size."""
    features = measured["features"].flatten(1).float()
    half = len(features) // 2
    apart = (features[:half] - features[half : 2 * half]).norm(dim=1)  # from independent pairs
    widen = (len(features) / size) ** 0.5
    columns = {n: measured[n] for n in ("reward", "judge") if n in measured} | {"diversity": apart}
    made = {name: estimate(values.flatten()) for name, values in columns.items()}
    return {
        name: Estimate(e.mean, None if e.error is None else e.error * widen)
        for name, e in made.items()
    }


def tilt_table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return the rows of `exact_tilts` as a Markdown table, with an explanation."""
    rows = list(rows)
    names = [n for n in ("reward", "judge", "diversity") if n in rows[0]]
    cells = [
        ["the model" if r["temperature"] is None else f"{r['temperature']:.4g}",
         f"{r['strength']:.3g}", f"{r['kl']:.3f}", f"{r['ess']:.0f}", *(r[n] for n in names)]
        for r in rows
    ]  # fmt: skip
    header = ["temperature T", "strength", "KL in nats", "effective samples", *names]
    return (
        f"## The exact tilt\n\n{markdown(header, cells)}\n\n"
        "One sample of p exp(R / T) / Z, without network calls. No law with the same "
        "divergence from the model has a higher\nmean reward. A method that keeps the "
        "best of its particles does not return samples of its law: compare with keep=all.\n"
    )
