"""A two-time network for points: `v(x, s, t)` by a small MLP, for benchmarks in the plane."""

import itertools

import torch
from torch import Tensor, nn

from steer.flow import FlowMap
from steer.onto import row_times
from steer.path import Linear, Path, Time, as_time, like

__all__ = ["TwoTimeMLP"]


class TwoTimeMLP(FlowMap):
    """The flow map of an MLP `v(x, s, t)`: `X(s,t,x) = x + (t-s) v(x,s,t)`, theory (10).

    The inputs of the MLP are x, and cosines and sines of s and of the gap t - s, up to `highest`
    radians. So s and t can be distinguished, and the time derivatives stay bounded. It binds no
    prompts.

    Args:
        dimension: dimension of a point.
        width: width of the hidden layers.
        depth: number of hidden layers.
        frequencies: number of frequencies for each time.
        highest: highest frequency, in radians.
        path: the interpolation.
    """

    def __init__(
        self,
        dimension: int = 2,
        width: int = 256,
        depth: int = 3,
        frequencies: int = 6,
        highest: float = 12.0,
        path: Path | None = None,
    ) -> None:
        super().__init__()
        self.path, self.event_shape = path or Linear(), (dimension,)
        self.frequencies, self.highest = frequencies, highest
        sizes = [dimension + 4 * frequencies + 2, *[width] * depth]
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise(sizes):
            layers += [nn.Linear(a, b), nn.GELU()]
        last = nn.Linear(width, dimension)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.network = nn.Sequential(*layers, last)

    @property
    def denoiser(self) -> nn.Module:
        """The MLP."""
        return self.network

    def mean_velocity(self, x: Tensor, s: Time, t: Time) -> Tensor:
        """Return v(x, s, t), (n, dimension)."""
        s, t = row_times(s, x, x.dtype), row_times(t, x, x.dtype)
        count = torch.arange(1, self.frequencies + 1, device=x.device, dtype=x.dtype)
        rates = self.highest / self.frequencies * count
        angles = torch.cat([s[:, None] * rates, (t - s)[:, None] * rates], 1)
        times = torch.stack([s, t - s], 1)
        return self.network(torch.cat([x, times, angles.cos(), angles.sin()], 1))

    def velocity(self, x: Tensor, t: Time) -> Tensor:
        """Return `b_t(x) = v(x, t, t)`."""
        return self.mean_velocity(x, t, t)

    def jump(self, x: Tensor, s: Time, t: Time) -> Tensor:
        """Return `X(s,t,x) = x + (t - s) v(x, s, t)`: exactly x where s = t."""
        return x + like(as_time(t) - as_time(s), x) * self.mean_velocity(x, s, t)
