"""The mean of a reward over random crops, flips and noise of the picture."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rewards.combine.algebra import Composed
from steer.reward import Reward, clamp01, score

__all__ = ["Augmented"]


class Augmented(Composed):
    """The mean of a reward over random crops, flips and noise: `1/k sum_i r(T_i x)`.

    The T_i are sampled once, from the seed. They are the same for every picture and every call, so
    that the reward is the same function for the whole run.

    Args:
        reward: what is averaged.
        views: k; the first is the picture itself.
        crop: how much of a side a crop may leave out, 0 to 0.9; each view keeps a random fraction
            of the sides in [1 - crop, 1], at a random place, and is resized to the picture's size.
        flip: whether half of the views are mirrored. Leave it out for pictures with letters.
        noise: standard deviation of the fixed noise on each view but the first.
        seed: seed of the random views.

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
            raise ValueError(f"crop must be in 0 to 0.9, a fraction of the side, got {crop}")
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
