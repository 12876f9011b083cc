"""The size of a picture as a JPEG file."""

import io
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from steer.reward import Reward

__all__ = ["Jpeg"]


class Jpeg(Reward):
    """Minus the true size of the JPEG file in kB (1,000 bytes): higher is simpler. No gradient.

    (Black et al. 2023, arXiv 2305.13301, use it as a reward.)

    Known hack: an empty picture is the smallest.

    Args:
        quality: of the JPEG encoder, 1 to 95.
        sign: -1 for simple pictures, 1 for complex ones.
    """

    differentiable = False

    def __init__(self, quality: int = 95, sign: float = -1.0) -> None:
        super().__init__()
        if not isinstance(quality, int) or not 1 <= quality <= 95:
            raise ValueError(f"quality must be a whole number in 1 to 95, got {quality!r}")
        self.quality, self.sign = quality, sign

    def forward(
        self,
        images: Tensor,
        prompts: Sequence[str] | None = None,
        metadata: Sequence[Any] | None = None,
    ) -> Tensor:
        """Score images (n, 3, h, w) in [0, 1] -> (n,) in kB."""
        from PIL import Image

        pixels = images.detach().float().clamp(0, 1).mul(255).round().byte()
        sizes = []
        for picture in pixels.permute(0, 2, 3, 1).cpu().numpy():
            file = io.BytesIO()
            Image.fromarray(picture).save(file, "JPEG", quality=self.quality)
            sizes.append(file.tell() / 1000)
        return self.sign * torch.tensor(sizes, device=images.device)
