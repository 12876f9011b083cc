"""Deduce from the steps of an observed run: times, signs, and how guidance is mixed."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from steer.backends.watching import Found, Watched

__all__ = [
    "Levels",
    "at_norm",
    "bound_of",
    "error_of",
    "implied",
    "levels_of",
    "mixing_of",
    "sign_of",
    "signal_of",
]


@dataclass(frozen=True)
class Levels:
    """How a denoiser's times follow the noise level s: `start + scale s / (s + shift (1 - s))`.

    Some pipelines shift the levels of the state but not the times that they pass to the denoiser.
    """

    start: float
    scale: float
    shift: float

    def __call__(self, s: Tensor) -> Tensor:
        """Return the denoiser's times for noise levels."""
        return self.start + self.scale * s / (s + self.shift * (1 - s))


def levels_of(levels: Tensor, times: list[float]) -> Levels:
    """Return how a denoiser's times follow noise levels.

    Args:
        levels: of the steps, decreasing.
        times: the denoiser's inputs.

    Raises:
        ValueError: the relation is of no known form.
    """
    s = levels[: len(times)].double()
    told = torch.tensor(times, dtype=torch.float64)
    scale = (told[1] - told[0]) / (s[1] - s[0])
    # solve told (s + shift (1 - s)) = scale s for scale and shift
    columns = torch.stack([s, -told * (1 - s)], 1)
    shifted = torch.linalg.lstsq(columns, told * s).solution
    for found in (
        Levels(float(told[0] - scale * s[0]), float(scale), 1.0),
        Levels(0.0, float(shifted[0]), float(shifted[1])),
    ):
        if bool(((found(s) - told).abs() <= 2e-3 * told.abs().max()).all()):
            return found
    pairs = ", ".join(f"{a:.4g} at level {b:.4g}" for a, b in zip(times, s.tolist(), strict=True))
    raise ValueError(
        f"the times that its denoiser is told ({pairs}) follow no shift of noise levels"
    )


def sign_of(steps: list[Found], levels: Tensor) -> float:
    """Return whether the denoiser predicts noise minus data (-1) or data minus noise (1)."""
    a, b = steps[:2]
    slope = (b.state - a.state).double() / float(levels[1] - levels[0])
    return -1.0 if error_of(a.predictions[0], slope) < error_of(a.predictions[0], -slope) else 1.0


def implied(
    steps: list[Found], watched: Watched, said: Mapping[str, Any], noise: bool
) -> list[tuple[Found, Tensor]]:
    """Return the steps, each with the prediction that is implied by the pipeline's next state."""
    scheduler, found = watched.scheduler, []
    for i, (a, b) in enumerate(pairwise(steps)):
        y, z = a.state.double(), b.state.double()
        if not noise:
            gap = float(scheduler.sigmas[i + 1] - scheduler.sigmas[i])
            found.append((a, -said["sign"] * (z - y) / gap))
            continue
        (c, s), (d, r) = (signal_of(scheduler, step.time) for step in (a, b))
        kind = scheduler.config.prediction_type
        if kind == "epsilon":
            found.append((a, (z - d * y / c) / (r - d * s / c)))
        elif kind == "v_prediction":
            found.append((a, (z - (d * c + r * s) * y) / (r * c - d * s)))
        else:
            found.append((a, (z - r * y / s) / (d - r * c / s)))
    return found


def signal_of(scheduler: Any, step: float) -> tuple[float, float]:
    """Return the coefficients of data and noise at a training step, `a² + s² = 1`."""
    level = float(scheduler.alphas_cumprod[round(step)])
    return level**0.5, (1 - level) ** 0.5


def mixing_of(implied: list[tuple[Found, Tensor]], scale: float) -> dict[str, Any]:
    """Return how the pipeline mixes its two predictions; nothing if there is only one per step."""
    if all(len(step.predictions) == 1 for step, _ in implied):
        return {"cfg_argument": None}
    if any(len(step.predictions) != 2 for step, _ in implied):
        raise ValueError("with guidance it does not call its denoiser with two prompts per step")
    tried = []
    for first in (False, True):
        for own in (False, True):
            for rescaled in (False, True):
                error = 0.0
                for step, wanted in implied:
                    p = step.predictions
                    c, u = (p[0], p[1]) if first else (p[1], p[0])
                    mixed = (c if own else u) + scale * (c - u)
                    mixed = at_norm(mixed, c) if rescaled else mixed
                    error = max(error, error_of(mixed, wanted))
                how = {"prompt_first": first, "from_prompt": own, "rescaled": rescaled}
                tried.append((error, how))
    error, how = min(tried, key=lambda pair: pair[0])
    if error > bound_of(implied[0][0].state.dtype):
        raise ValueError(
            f"its guidance is mixed in an unknown way (nearest: {error:.1%} off); give cfg=1.0 to "
            "use it without"
        )
    return how


def at_norm(mixed: Tensor, c: Tensor) -> Tensor:
    """Rescale a guided prediction to the norm of the prompt's prediction, along the last axis."""
    return mixed * (c.norm(dim=-1, keepdim=True) / mixed.norm(dim=-1, keepdim=True))


def error_of(found: Tensor, wanted: Tensor) -> float:
    """Return the norm of the difference, relative to the expected value."""
    gap = found.double() - wanted.double()
    return float(gap.norm() / wanted.double().norm().clamp(min=1e-30))


def bound_of(dtype: torch.dtype) -> float:
    """Return the relative tolerance between a flow and its pipeline, in the states' precision."""
    return 1e-2 if dtype == torch.float32 else 0.1
