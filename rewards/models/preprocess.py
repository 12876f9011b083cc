"""Preprocess pictures in [0, 1] for a network, with tensor operations only.

The gradient reaches the picture: there is no PIL, no numpy, and no clamp without a gradient.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steer.reward import clamp01, unknown

__all__ = ["FITS", "Preprocess"]

FITS = ("squash", "crop", "pad")
"""How another shape is converted to the network's: stretched; the shorter side fitted and the
centre cropped; the longer side fitted and the rest filled."""


class Preprocess(nn.Module):
    """`(resize(clamp(x)) - mean) / std`, images (n, 3, h, w) in [0, 1] -> (n, 3, *size).

    The resize is antialiased, as Pillow's is; its overshoot is clamped to [0, 1], the gradient
    passed straight through. It works in float32 at least.

    Args:
        size: (height, width) of the network's input, or one number for a square.
        mean: of each channel, in the units of [0, 1] pictures.
        std: of each channel, in the same units.
        interpolation: "bicubic" or "bilinear".
        fit: one of `FITS`.
        fill: grey level of the area that "pad" adds, from 0 (black) to 1 (white).
        fitted: the size that pictures are fitted to before the network's size is cropped from the
            centre; None: the network's own size.

    Raises:
        ValueError: an unknown interpolation or fit.
    """

    def __init__(
        self,
        size: int | Sequence[int],
        mean: Sequence[float],
        std: Sequence[float],
        interpolation: str = "bicubic",
        fit: str = "crop",
        fill: float = 0.0,
        fitted: int | Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if interpolation not in {"bicubic", "bilinear"}:
            raise unknown("interpolation", interpolation, ["bicubic", "bilinear"])
        if fit not in FITS:
            raise unknown("fit", fit, FITS)
        self.size, self.interpolation, self.fit = _pair(size), interpolation, fit
        self.fitted = self.size if fitted is None else _pair(fitted)
        self.fill = fill
        self.register_buffer("mean", torch.tensor(list(mean))[:, None, None], False)
        self.register_buffer("std", torch.tensor(list(std))[:, None, None], False)
        self.mean: Tensor
        self.std: Tensor

    @classmethod
    def of_open_clip(cls, model: Any) -> "Preprocess":
        """Return the preprocessing of an open_clip model, as its configuration specifies."""
        import open_clip

        settings = open_clip.get_model_preprocess_cfg(model)
        fits = {"squash": "squash", "shortest": "crop", "longest": "pad"}
        return cls(
            settings["size"],
            settings["mean"],
            settings["std"],
            settings.get("interpolation", "bicubic"),
            fits[settings.get("resize_mode", "shortest")],
            settings.get("fill_color", 0) / 255,
        )

    @classmethod
    def of_processor(cls, processor: Any) -> "Preprocess":
        """Return the preprocessing of a transformers image processor."""
        size = dict(processor.size)
        crop = dict(getattr(processor, "crop_size", None) or {})
        cropped = "shortest_edge" in size or getattr(processor, "do_center_crop", False)
        target = crop if cropped and crop else size
        side = target.get("shortest_edge")
        shape = side if side is not None else (target["height"], target["width"])
        name = {2: "bilinear", 3: "bicubic"}.get(int(processor.resample), str(processor.resample))
        shorter = size.get("shortest_edge") if target is crop else None
        fit = "crop" if cropped else "squash"
        return cls(shape, processor.image_mean, processor.image_std, name, fit, fitted=shorter)

    def resized(self, images: Tensor) -> Tensor:
        """Resize images (n, 3, h, w) in [0, 1] to the network's size; they stay in [0, 1]."""
        x = clamp01(images)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        x = self._fit(x)
        height, width = self.size
        top, left = (x.shape[-2] - height) // 2, (x.shape[-1] - width) // 2
        return x[..., top : top + height, left : left + width]

    def _fit(self, x: Tensor) -> Tensor:
        (h, w), (height, width) = x.shape[-2:], self.fitted
        if self.fit == "squash" or (h, w) == (height, width):
            return self._resize(x, (height, width))
        if self.fit == "crop":  # rounded down, as torchvision does
            scale = max(height / h, width / w) + 1e-9
            return self._resize(x, (int(h * scale), int(w * scale)))
        scale = min(height / h, width / w)
        x = self._resize(x, (max(1, round(h * scale)), max(1, round(w * scale))))
        y, z = height - x.shape[-2], width - x.shape[-1]
        return F.pad(x, (z // 2, z - z // 2, y // 2, y - y // 2), value=self.fill)

    def _resize(self, x: Tensor, shape: tuple[int, int]) -> Tensor:
        if x.shape[-2:] == shape:
            return x
        return clamp01(
            F.interpolate(x, shape, mode=self.interpolation, align_corners=False, antialias=True)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Preprocess images (n, 3, h, w) in [0, 1]."""
        x = self.resized(images)
        return (x - self.mean.to(x)) / self.std.to(x)


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    return height, width
