"""Views of a picture: what only one network reads survives less of their average."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rewards.combine.algebra import Composed
from steer.reward import Reward, clamp01, score

__all__ = ["SHIFTS", "Augmented", "shifted"]

SHIFTS = ((1, 1), (-1, -1), (1, -1), (-1, 1))
"""Of the third view and the next, in sixteenths of the height and the width."""


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


class Augmented(Composed):
    """The mean of a reward over random crops, flips and noise: `1/k sum_i r(T_i x)`.

    The T_i are drawn once, from the seed: the same for every picture and every call, so that the
    reward stays one function for a run.

    Args:
        reward: what is averaged.
        views: k; the first is the picture itself.
        crop: how much of a side a crop may leave out, 0 to 0.9; each view keeps a share of the
            sides drawn from [1 - crop, 1], at a place drawn as well, and is brought back to the
            picture's size.
        flip: whether half of the views are mirrored. Leave it out for pictures with letters.
        noise: standard deviation of the fixed noise on each view but the first.
        seed: fixes the draws.

    Raises:
        ValueError: a number out of its range.
    """

    def __init__(
        self,
        reward: Reward,
        views: int = 4,
        crop: float = 0.2,
        flip: bool = True,
        noise: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__(reward)
        if not isinstance(views, int) or views < 1:
            raise ValueError(f"views must be a whole number above zero, got {views!r}")
        if not 0 <= crop <= 0.9:
            raise ValueError(f"crop must be in 0 to 0.9, a share of the side, got {crop}")
        if not noise >= 0:
            raise ValueError(f"noise must not be negative, got {noise}")
        self.views, self.crop, self.noise, self.seed = views, float(crop), float(noise), seed
        draws = torch.rand((views, 4), generator=torch.Generator().manual_seed(seed))
        draws[0] = torch.tensor([0.0, 0.5, 0.5, 1.0])
        self._draws = draws.tolist()
        self.flip = flip

    def view(self, images: Tensor, i: int) -> Tensor:
        """Return the i-th view of images (n, 3, h, w): their shape, float32 or wider."""
        share, up, along, mirror = self._draws[i]
        x = clamp01(images)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        h, w = x.shape[-2:]
        height, width = (max(1, round(side * (1 - self.crop * share))) for side in (h, w))
        top, left = round(up * (h - height)), round(along * (w - width))
        if (height, width) != (h, w):
            x = x[..., top : top + height, left : left + width]
            x = F.interpolate(x, (h, w), mode="bilinear", align_corners=False, antialias=True)
        if self.flip and mirror < 0.5:
            x = x.flip(-1)
        if self.noise and i:
            generator = torch.Generator().manual_seed(self.seed + i)
            x = x + self.noise * torch.randn(x.shape[1:], generator=generator).to(x)
        return x

    def forward(
        self,
        images: Tensor,
        prompts: Sequence[str] | None = None,
        metadata: Sequence[Any] | None = None,
    ) -> Tensor:
        """Score images (n, 3, h, w) -> (n,), in the reward's units."""
        ((_, reward),) = self.terms
        seen = (self.view(images, i) for i in range(self.views))
        return torch.stack([score(reward, x, prompts, metadata) for x in seen]).mean(0)
