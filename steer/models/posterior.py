"""Networks of posterior maps: an MLP for points, and preconditioning for any network."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from steer.path import Path, like

__all__ = ["PosteriorMLP", "Preconditioned"]


class PosteriorMLP(nn.Module):
    """A network for posterior maps of points: `v(u, r, s, x, t)` by an MLP, (n, dimension).

    It sees u, x, the times r, s - r and t, and their cosines and sines up to `highest` radians.

    Args:
        dimension: dimension of a point.
        width: width of the hidden layers.
        depth: number of hidden layers.
        frequencies: number of frequencies for each time.
        highest: highest frequency, in radians.
    """

    def __init__(
        self,
        dimension: int = 2,
        width: int = 128,
        depth: int = 3,
        frequencies: int = 4,
        highest: float = 8.0,
    ) -> None:
        super().__init__()
        rates = highest / frequencies * torch.arange(1, frequencies + 1)
        self.register_buffer("rates", rates)
        self.rates: Tensor
        layers: list[nn.Module] = []
        for a, b in pairwise([2 * dimension + 3 + 6 * frequencies, *[width] * depth]):
            layers += [nn.Linear(a, b), nn.GELU()]
        self.layers = nn.Sequential(*layers, nn.Linear(width, dimension))

    def forward(self, u: Tensor, r: Tensor, s: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Return v, (n, dimension), for states (n, dimension) and times (n,)."""
        times = torch.stack([r, s - r, t], 1)
        angles = (times[..., None] * self.rates.to(times)).flatten(1)
        seen = torch.cat([times, angles.cos(), angles.sin()], 1).to(u)
        return self.layers(torch.cat([u, x, seen], 1))


class Preconditioned(nn.Module):
    """A network for posterior maps that corrects the closed form of N(0, I) data.

    Were the data N(0, I), the posterior would be `N(μ, c² I)`, `μ = β x / (α² + β²)`,
    `c² = α² / (α² + β²)`, and its map linear. With `sd_r² = (1-r)² + r² c²`:

        v(u, r, s, x, t) = μ + ((r+s) c² - (2-r-s)) / (sd_r (sd_r + sd_s)) (u - r μ)
                           + c/sd_r F((u - r μ) / sd_r, r, s, x, t)

    so what F sees, and what is left for it, have a unit scale at every t: near t = 1 the posterior
    is a narrow spike at x, which a bare network would have to learn. Data are meant to have about
    unit variance. Ours, after Karras et al. 2022, arXiv 2206.00364.

    Args:
        network: F, of the form of a posterior map's network.
        path: path of the outer flow.
    """

    def __init__(self, network: nn.Module, path: Path) -> None:
        super().__init__()
        self.network, self.path = network, path

    def given(self, prompts: Sequence[str]) -> "Preconditioned":
        """Return the network with prompts bound; itself, if F takes no prompts."""
        given = getattr(self.network, "given", None)
        return self if given is None else Preconditioned(given(prompts), self.path)

    def forward(self, u: Tensor, r: Tensor, s: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Return v, (n, *event), for states (n, *event) and times (n,)."""
        alpha, beta = self.path(t)
        square = alpha**2 + beta**2
        c = (alpha / square.sqrt()).clamp(min=1e-4)  # at t = 1, r = 1 the limit is 0/0
        sd_r, sd_s = (torch.hypot(1 - a, a * c) for a in (r, s))
        rate = ((r + s) * c**2 - (2 - r - s)) / (sd_r * (sd_r + sd_s))
        mean = like(beta / square, x) * x
        gap = u - like(r, x) * mean
        rest = self.network(gap / like(sd_r, x), r, s, x, t)
        return mean + like(rate, x) * gap + like(c / sd_r, x) * rest
