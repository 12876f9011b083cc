"""Interpolation paths `x_t = alpha_t x_0 + beta_t x_1` between noise (t = 0) and data (t = 1).

Every path has `alpha_0 = beta_1 = 1` and `beta_0 = alpha_1 = 0`: docs/theory.md, theory (1).

>>> alpha, beta = Linear()(0.25)
>>> float(alpha), float(beta)
(0.75, 0.25)
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from steer.ranges import count, finite

__all__ = [
    "Cosine",
    "Linear",
    "Path",
    "Time",
    "VariancePreserving",
    "as_time",
    "like",
    "step_times",
]

Time = float | Tensor
"""A time: a float, or a tensor of shape () or (n,)."""


def as_time(t: Time) -> Tensor:
    """Return `t` as a tensor; a float keeps its double precision as a 0-d tensor.

    Raises:
        ValueError: a float that is NaN or infinite.
    """
    if isinstance(t, Tensor):
        return t
    return torch.tensor(finite("a time", t), dtype=torch.float64)


def like(c: Tensor, x: Tensor) -> Tensor:
    """Shape a coefficient () or (n,) so that it multiplies `x` (n, *event) row by row."""
    if c.ndim == 0:
        return c.to(x.dtype) if c.device.type == "cpu" else c.to(x)
    if c.shape != x.shape[:1]:
        raise ValueError(
            f"a time of shape {tuple(c.shape)} does not fit {x.shape[0]} rows: "
            "give a float, a scalar tensor or one time per row"
        )
    return c.to(x).reshape(-1, *[1] * (x.ndim - 1))


def step_times(steps: int, start: float = 0.0) -> list[float]:
    """Return `steps + 1` equidistant times from `start` to 1.

    >>> step_times(2)
    [0.0, 0.5, 1.0]

    Raises:
        ValueError: less than one step, or a start that is not in [0, 1).
    """
    count("steps", steps)
    if not 0 <= start < 1:
        raise ValueError(f"start must be in [0, 1), got {start}")
    return [start + (1 - start) * k / steps for k in range(steps)] + [1.0]


class Path(ABC):
    """Noise and data coefficients as functions of time."""

    @abstractmethod
    def __call__(self, t: Time) -> tuple[Tensor, Tensor]:
        """Return (alpha_t, beta_t), with the shape of `t`."""

    @abstractmethod
    def derivative(self, t: Time) -> tuple[Tensor, Tensor]:
        """Return their time derivatives (alpha'_t, beta'_t), with the shape of `t`."""

    def interpolate(self, x_0: Tensor, x_1: Tensor, t: Time) -> Tensor:
        """Return `x_t = alpha_t x_0 + beta_t x_1`, theory (1), (n, *event)."""
        alpha, beta = self(t)
        return like(alpha, x_0) * x_0 + like(beta, x_1) * x_1

    def slope(self, x_0: Tensor, x_1: Tensor, t: Time) -> Tensor:
        """Return `x'_t = alpha'_t x_0 + beta'_t x_1`, the velocity of one pair, (n, *event)."""
        alpha_dot, beta_dot = self.derivative(t)
        return like(alpha_dot, x_0) * x_0 + like(beta_dot, x_1) * x_1

    def renoise(self, u: Time, t: Time) -> tuple[Tensor, Tensor]:
        """Return k and v of `x_t = k x_u + sqrt(v) z`, theory (25), u >= t: marginals are kept.

        `k = beta_t / beta_u` and `v = alpha_t² - k² alpha_u²`, exactly 1 and 0 where u = t.
        """
        (alpha_t, beta_t), (alpha_u, beta_u) = self(t), self(u)
        same = as_time(u) == as_time(t)
        k = torch.where(same, 1.0, beta_t / beta_u)
        return k, torch.where(same, 0.0, alpha_t**2 - k**2 * alpha_u**2)

    def denoised(self, x: Tensor, b: Tensor, t: Time) -> Tensor:
        """Return `D_t(x) = (alpha b - alpha' x) / (alpha beta' - alpha' beta)`, theory (4).

        Args:
            x: states at t, (n, *event).
            b: the velocity there, (n, *event).
            t: below 1.
        """
        (alpha, beta), (alpha_dot, beta_dot) = self(t), self.derivative(t)
        scale = alpha * beta_dot - alpha_dot * beta
        return like(alpha / scale, x) * b - like(alpha_dot / scale, x) * x

    def carried(self, x: Tensor, d: Tensor, s: Time, t: Time) -> Tensor:
        """Return x at s carried to t with a prediction d of the data: exactly x where s = t.

        `x_t = (alpha_t / alpha_s) x_s + (beta_t - beta_s alpha_t / alpha_s) d`, which keeps the
        noise that d leaves in x_s: Euler's step on the linear path, DDIM's on others (Song et al.
        2021, arXiv 2010.02502).

        Args:
            x: points at s, (n, *event).
            d: predictions of the data, (n, *event).
            s: start.
            t: end.
        """
        s, t = as_time(s), as_time(t)
        (alpha_s, beta_s), (alpha_t, beta_t) = self(s), self(t)
        ratio = torch.where(s == t, 1.0, alpha_t / torch.where(alpha_s == 0, 1.0, alpha_s))
        return like(ratio, x) * x + like(beta_t - ratio * beta_s, x) * d

    def velocity_of(self, x: Tensor, d: Tensor, t: Time) -> Tensor:
        """Return `b = (alpha'/alpha) (x - beta d) + beta' d`, (n, *event), for t < 1.

        The inverse of `denoised`.
        """
        (alpha, beta), (alpha_dot, beta_dot) = self(t), self.derivative(t)
        return like(alpha_dot / alpha, x) * (x - like(beta, x) * d) + like(beta_dot, x) * d

    def score(self, x: Tensor, d: Tensor, t: Time) -> Tensor:
        """Return `s_t(x) = -(x - beta D) / alpha²`, theory (5), for the denoiser d at (x, t)."""
        alpha, beta = self(t)
        return (like(beta, x) * d - x) / like(alpha**2, x)


class Linear(Path):
    """`alpha_t = 1 - t`, `beta_t = t` (rectified flow; Liu et al. 2022, arXiv 2209.03003)."""

    def __call__(self, t: Time) -> tuple[Tensor, Tensor]:
        """Return (1 - t, t)."""
        t = as_time(t)
        return 1 - t, t

    def derivative(self, t: Time) -> tuple[Tensor, Tensor]:
        """Return (-1, 1)."""
        one = torch.ones_like(as_time(t))
        return -one, one


class Cosine(Path):
    """`alpha_t = cos(pi t / 2)`, `beta_t = sin(pi t / 2)` (Albergo et al. 2023, 2303.08797)."""

    def __call__(self, t: Time) -> tuple[Tensor, Tensor]:
        """Return (cos, sin) of pi t / 2, exact at both ends."""
        t = as_time(t)
        return torch.sin((1 - t) * (math.pi / 2)), torch.sin(t * (math.pi / 2))

    def derivative(self, t: Time) -> tuple[Tensor, Tensor]:
        """Return pi/2 (-sin, cos) of pi t / 2."""
        alpha, beta = self(t)
        return -math.pi / 2 * beta, math.pi / 2 * alpha


class VariancePreserving(Path):
    """The variance-preserving diffusion, with `alpha² + beta² = 1` and rescaled ends.

    With `B(t) = exp(-rate_min (1-t) / 2 - (rate_max - rate_min) (1-t)² / 4)` (Song et al. 2021,
    2011.13456, time reversed), `beta_t = (B(t) - B(0)) / (1 - B(0))`, so that no signal is left at
    t = 0 (the rescaling of Lin et al. 2023, 2305.08891), and `alpha_t = sqrt(1 - beta_t²)`.
    `alpha'` is infinite at t = 1, so there is no velocity at t = 1. See theory (2).

    Args:
        rate_min: noise rate at the data end, > 0.
        rate_max: noise rate at the noise end, >= rate_min.

    Raises:
        ValueError: rates that violate these bounds.
    """

    def __init__(self, rate_min: float = 0.1, rate_max: float = 20.0) -> None:
        if not 0 < rate_min <= rate_max < math.inf:
            raise ValueError(
                f"expected 0 < rate_min <= rate_max, both finite, got {rate_min} and {rate_max}"
            )
        self.rate_min, self.rate_max = rate_min, rate_max
        self._floor = math.exp(-rate_min / 2 - (rate_max - rate_min) / 4)

    def _exponent(self, t: Tensor) -> Tensor:
        u = 1 - t
        return self.rate_min * u / 2 + (self.rate_max - self.rate_min) * u**2 / 4

    def __call__(self, t: Time) -> tuple[Tensor, Tensor]:
        """Return (sqrt(1 - beta²), beta), alpha to full precision near t = 1 too."""
        exponent = self._exponent(as_time(t))
        beta = ((-exponent).exp() - self._floor) / (1 - self._floor)
        missing = -torch.expm1(-exponent) / (1 - self._floor)  # 1 - beta, without cancellation
        return (missing * (1 + beta)).clamp(min=0).sqrt(), beta

    def derivative(self, t: Time) -> tuple[Tensor, Tensor]:
        """Return (-beta beta' / alpha, beta')."""
        t = as_time(t)
        alpha, beta = self(t)
        rate = self.rate_min + (self.rate_max - self.rate_min) * (1 - t)
        beta_dot = (-self._exponent(t)).exp() * rate / 2 / (1 - self._floor)
        return -beta * beta_dot / alpha, beta_dot
