"""A reward for closeness to a given picture."""

from pathlib import Path

from torch import Tensor
from torch.nn import functional as F

from rewards.pixels.reading import PixelReward, luma, read, rms
from steer.reward import unknown

__all__ = ["Similarity"]

_VIEWS = {"colour": lambda x: x, "luma": luma}


class Similarity(PixelReward):
    """Closeness to a reference picture, from -1 (its negative in black and white) to 0 (it is).

    `-sqrt(mean (v(x) - v(r))^2)` over pixels and channels, with r the reference, stretched to the
    picture's size (bilinear, antialiased) and v the picture itself or its luma.

    Known hack: a blurred or grey mean of the reference comes close without showing it. A slightly
    shifted drawing gets a low score.

    Args:
        image: the reference, a picture file; transparent parts are placed on white.
        by: what is compared, "colour" or "luma".

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is no picture; another `by`, the message has the nearest names.
    """

    def __init__(self, image: str | Path, by: str = "colour") -> None:
        super().__init__()
        if by not in _VIEWS:
            raise unknown("value of by", str(by), _VIEWS)
        self.by = by
        self.register_buffer("reference", read(image, "image"))
        self.reference: Tensor

    def measure(self, x: Tensor) -> Tensor:
        """Score pictures (n, 3, h, w) in [0, 1] -> (n,) in [-1, 0]."""
        reference = F.interpolate(
            self.reference.to(x), x.shape[-2:], mode="bilinear", antialias=True
        )
        view = _VIEWS[self.by]
        return -rms(view(x) - view(reference))
