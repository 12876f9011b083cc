"""Tangents of bounded size, for training consistency models in continuous time."""

from torch import Tensor

from steer.path import like

__all__ = ["normalised", "towards", "warmed"]


def normalised(g: Tensor, c: float = 0.1) -> Tensor:
    """Return `g / (|g| + c)`, |g| the root mean square of a row (Lu, Song 2024, 2410.11081)."""
    size = g.flatten(1).square().mean(1).sqrt()
    return g / like(size + c, g)


def towards(v: Tensor, g: Tensor) -> Tensor:
    """Return `v - sg[v + g]`: the value -g, with the gradient of v."""
    return v - (v + g).detach()


def warmed(progress: float, warm: float = 0.1) -> float:
    """Return the factor of the derivative's term, from 0 to 1 over the first `warm` of a run."""
    return min(1.0, progress / warm) if warm else 1.0
