"""Rewards whose tilt of a Gaussian mixture has a closed form."""

from typing import Any

import torch
from torch import Tensor

from steer.ranges import all_finite, symmetric
from steer.reward.base import Reward

__all__ = ["LinearReward", "QuadraticReward"]


class LinearReward(Reward):
    """`reward(x) = a . x` on vectors (n, d): `GaussianMixture.tilt` has its tilt, theory (42).

    Raises:
        ValueError: numbers that are not finite, or no vector.
    """

    pictures = False

    def __init__(self, a: Tensor) -> None:
        super().__init__()
        a = all_finite("a", torch.as_tensor(a))
        if a.ndim != 1:
            raise ValueError(f"a of shape {tuple(a.shape)}: give a vector (d,)")
        self.register_buffer("a", a)
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

    Raises:
        ValueError: shapes that do not fit, numbers that are not finite, a precision that is not
            symmetric or has a negative direction.
    """

    pictures = False

    def __init__(self, centre: Tensor, precision: Tensor) -> None:
        super().__init__()
        centre = all_finite("centre", torch.as_tensor(centre))
        precision = all_finite("precision", torch.as_tensor(precision))
        d = centre.numel()
        if centre.ndim != 1 or precision.shape != (d, d):
            raise ValueError(
                f"centre of shape {tuple(centre.shape)} and precision of shape "
                f"{tuple(precision.shape)}: give (d,) and (d, d)"
            )
        own = torch.linalg.eigvalsh(symmetric("precision", precision.double()))
        if float(own[0]) < -1e-6 * float(own.abs().max()):
            raise ValueError(
                f"precision has the eigenvalue {float(own[0]):.3g}: it must be positive "
                "semi-definite, or the reward grows without bound"
            )
        self.register_buffer("centre", centre)
        self.register_buffer("precision", precision)
        self.centre: Tensor
        self.precision: Tensor

    def forward(self, images: Tensor, prompts: Any = None, metadata: Any = None) -> Tensor:
        """Return `-1/2 (x - c)^T P (x - c)`, (n,)."""
        z = images - self.centre.to(images)
        return -0.5 * ((z @ self.precision.to(images)) * z).sum(-1)
