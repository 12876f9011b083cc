"""Rewards whose tilt of a Gaussian mixture has a closed form."""

from typing import Any

import torch
from torch import Tensor

from steer.reward.base import Reward

__all__ = ["LinearReward", "QuadraticReward"]


class LinearReward(Reward):
    """`reward(x) = a . x` on vectors (n, d): `GaussianMixture.tilt` has its tilt, theory (42)."""

    def __init__(self, a: Tensor) -> None:
        super().__init__()
        self.register_buffer("a", torch.as_tensor(a))
        self.a: Tensor

    def forward(self, images: Tensor, prompts: Any = None, metadata: Any = None) -> Tensor:
        """Return `x @ a`, (n,)."""
        return images @ self.a.to(images)


class QuadraticReward(Reward):
    """`reward(x) = -1/2 (x - c)^T P (x - c)` on vectors (n, d).

    `GaussianMixture.tilt` knows its tilt, theory (43).

    Args:
        centre: c, (d,).
        precision: P, symmetric and positive semi-definite, (d, d).
    """

    def __init__(self, centre: Tensor, precision: Tensor) -> None:
        super().__init__()
        self.register_buffer("centre", torch.as_tensor(centre))
        self.register_buffer("precision", torch.as_tensor(precision))
        self.centre: Tensor
        self.precision: Tensor

    def forward(self, images: Tensor, prompts: Any = None, metadata: Any = None) -> Tensor:
        """Return `-1/2 (x - c)^T P (x - c)`, (n,)."""
        z = images - self.centre.to(images)
        return -0.5 * ((z @ self.precision.to(images)) * z).sum(-1)
