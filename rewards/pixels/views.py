"""Shifted and noisy views of a picture, to average a score over."""

import torch
from torch import Tensor
from torch.nn import functional as F

from steer.reward import clamp01

__all__ = ["SHIFTS", "shifted"]

SHIFTS = ((1, 1), (-1, -1), (1, -1), (-1, 1))
"""Shifts of the third and later views, in sixteenths of the height and the width."""


def shifted(images: Tensor, views: int, noise: float) -> list[Tensor]:
    """Return up to 6 views: the picture, its mirror image, and shifts by a sixteenth of the side.

    Args:
        images: (n, 3, h, w) in [0, 1].
        views: how many, 1 to 6.
        noise: standard deviation of the fixed noise on each, in the units of the pictures.
    """
    if views == 1 and not noise:
        return [images]
    x = clamp01(images)
    h, w = x.shape[-2:]
    a, b = max(1, h // 16), max(1, w // 16)
    edge = (2 * b, 2 * b, 2 * a, 2 * a)
    wide = F.pad(x, edge, mode="replicate")
    made = [x, x.flip(-1)]
    for dy, dx in SHIFTS:
        top, left = 2 * a + dy * a, 2 * b + dx * b
        made.append(wide[..., top : top + h, left : left + w])
    made = made[:views]
    if not noise:
        return made
    grain = torch.randn((views, *x.shape[1:]), generator=torch.Generator().manual_seed(0)).to(x)
    return [view + noise * g for view, g in zip(made, grain, strict=True)]
