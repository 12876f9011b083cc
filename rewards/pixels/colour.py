"""Rewards of pixels only: a named colour, brightness."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from steer.reward import Reward, clamp01, hint

__all__ = ["Brightness", "Colour"]


class Colour(Reward):
    """Closeness of the drawing to a colour: minus its mean distance, from -1 (far) to 0 (equal).

    `-(sum_p w_p d_p + k) / (sum_p w_p + k)` over pixels p, with `d_p` the root-mean-square
    distance to the colour in RGB, `w_p` how far the pixel is from the white background (0 to 1,
    without a gradient) and `k` 5 % of the pixels, so that an empty picture counts as far away.

    Known hack: flat areas of that colour, whatever the picture shows. With a white target the
    drawing counts as background.

    Args:
        name: a CSS colour ("red", "royalblue") or "#rrggbb".

    Raises:
        ValueError: an unknown colour; the message has the nearest names.
    """

    def __init__(self, name: str = "red") -> None:
        super().__init__()
        self.name = name
        self.register_buffer("target", torch.tensor(_rgb(str(name))) / 255)
        self.target: Tensor

    def forward(
        self,
        images: Tensor,
        prompts: Sequence[str] | None = None,
        metadata: Sequence[Any] | None = None,
    ) -> Tensor:
        """Score images (n, 3, h, w) in [0, 1] -> (n,) in [-1, 0]."""
        x = clamp01(images)
        target = self.target.to(x)[:, None, None]
        distance = ((x - target).square().mean(1) + 1e-8).sqrt()
        weight = ((1 - x.detach()).amax(1) / 0.25).clamp(max=1)
        k = 0.05 * weight[0].numel()
        return -((weight * distance).sum((1, 2)) + k) / (weight.sum((1, 2)) + k)


def _rgb(name: str) -> tuple[int, int, int]:
    """Return a colour's bytes."""
    from PIL import ImageColor

    try:
        return ImageColor.getrgb(name)[:3]
    except ValueError:
        raise ValueError(
            f"unknown colour {name!r}: {hint(name, ImageColor.colormap)}Give a CSS name such as "
            "red, green, royalblue, or #rrggbb"
        ) from None


class Brightness(Reward):
    """Mean luma `.2126 R + .7152 G + .0722 B` (ITU-R BT.709), from 0 (black) to 1 (white).

    Known hack: an empty white picture scores 1.
    """

    def forward(
        self,
        images: Tensor,
        prompts: Sequence[str] | None = None,
        metadata: Sequence[Any] | None = None,
    ) -> Tensor:
        """Score images (n, 3, h, w) in [0, 1] -> (n,) in [0, 1]."""
        luma = torch.tensor([0.2126, 0.7152, 0.0722]).to(images)
        return (clamp01(images).mean((2, 3)) * luma).sum(1)
