"""Weighting of the errors of a batch: losses per row -> the mean to minimise."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from steer.names import unknown
from steer.objectives.regression import mean_square

__all__ = ["DISTANCES", "WEIGHTS", "LearnedWeight", "Weight", "huber", "weight_named"]

Weight = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(loss of each row (n,), s (n,), t (n,)) -> their weighted mean ()."""


def huber(error: Tensor, c: float = 0.03) -> Tensor:
    """Return `sqrt(e² + c²) - c`, its mean over the event, (n,) (Song, Dhariwal 2023, 2310.14189).

    Small errors count in proportion to their size, so that uniform areas become uniform. Its
    minimum is near the median, so the target must be a function of x: that of a teacher, never of
    a pair.
    """
    return ((error.float().square() + c * c).sqrt() - c).flatten(1).mean(1)


DISTANCES: Mapping[str, Callable[[Tensor], Tensor]] = {"square": mean_square, "huber": huber}
"""Name -> error (n, *event) to a loss a row (n,)."""


def uniform(loss: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """Return the mean."""
    return loss.mean()


def adaptive(loss: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """Return the mean of `loss / sg[loss + 1e-3]^.75` (Geng et al. 2025, 2505.13447)."""
    return (loss / (loss.detach() + 1e-3) ** 0.75).mean()


class LearnedWeight(nn.Module):
    """`exp(-w) loss + w`, w(s, t) a small network that starts at 0.

    Karras et al. 2024, arXiv 2312.02696. At its minimum `exp(w)` is the mean loss at (s, t), so
    all pairs of times have the same weight.

    Args:
        frequencies: number of cosines for each time.
    """

    def __init__(self, frequencies: int = 16) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.out = nn.Linear(4 * frequencies, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, loss: Tensor, s: Tensor, t: Tensor) -> Tensor:
        """Return the mean of `exp(-w) loss + w`."""
        count = torch.arange(1, self.frequencies + 1, device=s.device, dtype=torch.float32)
        angles = torch.cat([s[:, None] * count, t[:, None] * count], 1).float()
        w = self.out(torch.cat([angles.cos(), angles.sin()], 1).to(self.out.weight))[:, 0]
        return ((-w).exp() * loss + w).mean()


WEIGHTS: dict[str, Callable[[], Weight]] = {
    "uniform": lambda: uniform,
    "adaptive": lambda: adaptive,
    "learned": LearnedWeight,
}
"""Name -> makes the weight."""


def weight_named(name: str) -> Weight:
    """Return a weight by its name.

    Raises:
        ValueError: an unknown name, with the nearest one.
    """
    if name not in WEIGHTS:
        raise unknown("loss weight", name, WEIGHTS)
    return WEIGHTS[name]()
