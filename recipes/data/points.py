"""Laws in the plane with a velocity in closed form, for comparing training rules."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from steer.exact import GaussianMixture
from steer.flow import FlowMap
from steer.path import Linear, Time, as_time, like

__all__ = ["POINTS", "Checkerboard"]


class Checkerboard(FlowMap):
    """The uniform law on the dark squares of a board, [-2, 2]², with its exact velocity.

    Given `x_t`, `x_1` is normal with mean x/t and standard deviation (1-t)/t, truncated to the
    squares: a mixture of truncated normals, so `D_t` is known. The jump is integrated with the
    fourth-order Runge-Kutta method; near t = 1 it ends with the denoiser.

    Args:
        cells: number of squares along a side.
        half: half of the side length.
        steps: steps of the integration from 0 to 1.
    """

    def __init__(self, cells: int = 4, half: float = 2.0, steps: int = 100) -> None:
        super().__init__()
        self.path, self.event_shape, self.steps = Linear(), (2,), steps
        self.size = 2 * half / cells
        dark = [(i, j) for i in range(cells) for j in range(cells) if (i + j) % 2 == 0]
        self.low = torch.tensor(dark, dtype=torch.float64) * self.size - half  # (k, 2)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Sample n points, (n, 2)."""
        which = torch.randint(len(self.low), (n,), generator=generator)
        inside = torch.rand(n, 2, generator=generator, dtype=torch.float64)
        return self.low[which] + self.size * inside

    def inside(self, x: Tensor) -> Tensor:
        """Return whether each point is on a dark square, (n,)."""
        y = x[:, None].double() - self.low
        return ((y >= 0) & (y <= self.size)).all(2).any(1)

    def denoise(self, x: Tensor, t: Time) -> Tensor:
        """Return `E[x_1 | x_t = x]`, (n, 2)."""
        time = as_time(t).to(torch.float64).clamp(1e-4, 1 - 1e-6).expand(len(x))[:, None, None]
        mean, sd = x.double()[:, None] / time, (1 - time) / time  # (n, 1, 2), (n, 1, 1)
        a, b = (self.low - mean) / sd, (self.low + self.size - mean) / sd  # (n, k, 2)
        flip = a > 0  # the tail without cancellation
        a, b = torch.where(flip, -b, a), torch.where(flip, -a, b)
        log_a, log_b = torch.special.log_ndtr(a), torch.special.log_ndtr(b)
        log_mass = log_b + torch.log(-torch.expm1((log_a - log_b).clamp(max=-1e-300)))
        density = [(-u * u / 2 - math.log(2 * math.pi) / 2 - log_mass).exp() for u in (a, b)]
        shift = torch.where(flip, -1.0, 1.0) * (density[0] - density[1])
        low, high = self.low.expand_as(shift), (self.low + self.size).expand_as(shift)
        means = (mean + sd * shift).clamp(low, high)
        weights = log_mass.sum(2).softmax(1)
        return (weights[:, :, None] * means).sum(1).to(x)

    def velocity(self, x: Tensor, t: Time) -> Tensor:
        """Return `b_t(x) = (D_t(x) - x) / (1 - t)`."""
        time = as_time(t).clamp(max=1 - 1e-4)
        return (self.denoise(x, time) - x) / like(1 - time, x)

    def jump(self, x: Tensor, s: Time, t: Time) -> Tensor:
        """Return `X(s,t,x)`, integrated."""
        s, t = as_time(s), as_time(t)
        end = torch.minimum(t, torch.full_like(t, 0.998))
        h = (end - torch.minimum(s, end)) / self.steps
        for k in range(self.steps):
            at = s + k * h
            k1 = self.velocity(x, at)
            k2 = self.velocity(x + like(h / 2, x) * k1, at + h / 2)
            k3 = self.velocity(x + like(h / 2, x) * k2, at + h / 2)
            k4 = self.velocity(x + like(h, x) * k3, at + h)
            x = x + like(h / 6, x) * (k1 + 2 * k2 + 2 * k3 + k4)
        rest = like(t - torch.maximum(end, torch.minimum(s, t)), x)
        return x + rest * self.velocity(x, torch.maximum(end, torch.minimum(s, t)))


def _ring() -> GaussianMixture:
    angle = torch.arange(8, dtype=torch.float64) * math.pi / 4
    return GaussianMixture(2 * torch.stack([angle.cos(), angle.sin()], 1), 0.04)


def _mixture() -> GaussianMixture:
    means = torch.tensor([[-1.5, -1.5], [0.0, 0.0], [1.5, 1.5]], dtype=torch.float64)
    return GaussianMixture(means, 0.1)


POINTS: Mapping[str, Callable[[], GaussianMixture | Checkerboard]] = {
    "mixture": _mixture,
    "ring": _ring,
    "checkerboard": Checkerboard,
}
"""Name -> function that makes the law."""
