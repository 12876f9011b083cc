"""What pixel rewards share: how they see a picture, and how they read one from a file."""

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steer.reward import Reward, clamp01

__all__ = ["LARGEST", "PixelReward", "drawing", "ink", "luma", "read", "rms"]

LARGEST = 1024
"""Pictures from files are downscaled to this side, so that they can be resized quickly."""


class PixelReward(Reward):
    """A reward of pixels only: define `measure`.

    It sees the pictures clamped to [0, 1], the gradient passed straight through, in float32 at
    least.
    """

    @abstractmethod
    def measure(self, x: Tensor) -> Tensor:
        """Score pictures (n, 3, h, w) in [0, 1] -> (n,)."""

    def forward(
        self,
        images: Tensor,
        prompts: Sequence[str] | None = None,
        metadata: Sequence[Any] | None = None,
    ) -> Tensor:
        """Score images (n, 3, h, w) -> (n,), in float32 or the images' wider type."""
        x = clamp01(images)
        return self.measure(x.to(torch.promote_types(x.dtype, torch.float32)))


def luma(x: Tensor) -> Tensor:
    """Return `.2126 R + .7152 G + .0722 B` (ITU-R BT.709), (n, 3, h, w) -> (n, h, w)."""
    return (x * x.new_tensor([0.2126, 0.7152, 0.0722])[:, None, None]).sum(1)


def ink(x: Tensor) -> Tensor:
    """Return how far each pixel is from white, `1 - min(R, G, B)`: (n, 3, h, w) -> (n, h, w)."""
    return (1 - x).amax(1)


def drawing(x: Tensor) -> Tensor:
    """Return how much each pixel belongs to the drawing, `min(1, ink / 0.25)`, no gradient."""
    return (ink(x.detach()) / 0.25).clamp(max=1)


def rms(x: Tensor) -> Tensor:
    """Return the root mean square of each row, (n, ...) -> (n,); smooth at 0, where it is 0."""
    return (x.square().flatten(1).mean(1) + 1e-8).sqrt() - 1e-4


def read(file: str | Path, option: str, ground: float = 1.0) -> Tensor:
    """Read a picture file -> (1, 3, h, w) in [0, 1], no side longer than `LARGEST`.

    Args:
        file: any format Pillow reads, 8 bits a channel, or 16 of grey (divided by 65535); it is
            turned as its EXIF data say.
        option: the option that named the file, for the messages.
        ground: grey level under transparent pixels; 1 is white.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not such a picture; the message says what to give.
    """
    import numpy as np
    from PIL import Image, ImageOps

    path = Path(str(file))
    if not path.is_file():
        raise FileNotFoundError(
            f"no file {str(file)!r}: give the path of a picture, as {option}=picture.png"
        )
    try:
        with Image.open(path) as opened:
            deep = opened.mode.startswith("I;16") or (opened.mode, opened.format) == ("I", "PNG")
            if opened.mode.startswith(("I", "F")) and not deep:
                raise ValueError(f"it has more than 16 bits of grey ({opened.mode})")
            clear = opened.info.get("transparency") if deep else None
            picture = ImageOps.exif_transpose(opened)
            picture = picture if deep else picture.convert("RGBA")
            values = np.asarray(picture)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"cannot read {str(file)!r} as a picture: {error}. Save it as a PNG or JPEG with 8 "
            f"bits a channel and give it as {option}=..."
        ) from error
    if deep:  # in floats, so that all 16 bits are kept
        grey = values.astype(np.float32) / 65535
        picture = Image.fromarray(np.where(values == clear, np.float32(ground), grey))
        picture.thumbnail((LARGEST, LARGEST))
        return torch.tensor(np.asarray(picture)).clamp(0, 1).expand(1, 3, -1, -1).clone()
    picture.thumbnail((LARGEST, LARGEST))
    pixels = torch.tensor(np.asarray(picture)).permute(2, 0, 1)[None] / 255
    colour, alpha = pixels[:, :3], pixels[:, 3:]
    return alpha * colour + (1 - alpha) * ground
