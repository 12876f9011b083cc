"""Linear inverse problems: the log-likelihood of a measurement with Gaussian noise, as a reward.

`log p(y | x) = -|A x - y|² / (2 sd²)` up to a constant. At temperature 1 the tilt by it is the
posterior `p(x | y)` of Bayes' rule, so exact methods sample that, `noise-smc` whatever the model.
"""

import math
from abc import abstractmethod
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from rewards.pixels.reading import PixelReward, luma, read

__all__ = ["Deblurring", "Inpainting", "Measurement", "SuperResolution", "gaussian_blur"]


class Measurement(PixelReward):
    """`-|A x - y|² / (2 sd²)`, in nats: the sum over what is measured; `operator` is A.

    Args:
        image: y, or a picture that y is measured from, a file or a tensor (3, h, w) in [0, 1].
        sd: standard deviation of the noise on each measured number, in the units of [0, 1].
        grey: whether a pixel is one number, the mean of its channels, and not three: for models
            of one colour, whose three channels would count one number three times.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is no picture, or sd is not above 0.
    """

    def __init__(self, image: str | Path | Tensor, sd: float = 0.1, *, grey: bool = False) -> None:
        super().__init__()
        self.sd, self.grey = _above("sd", sd), grey
        given = image[None] if isinstance(image, Tensor) else read(image, "image")
        given = given.mean(1, keepdim=True) if grey else given
        self.register_buffer("image", given.float())
        self.image: Tensor

    @abstractmethod
    def operator(self, x: Tensor) -> Tensor:
        """Return A x of pictures (n, 3, h, w), linear, (n, ...)."""

    def measured(self, like: Tensor) -> Tensor:
        """Return y, (1, ...), for pictures of a size. Default: A of the picture."""
        return self.operator(_resized(self.image, like))

    def measure(self, x: Tensor) -> Tensor:
        """Score pictures (n, 3, h, w) in [0, 1] -> (n,) in (-inf, 0] nats."""
        x = x.mean(1, keepdim=True) if self.grey else x
        miss = self.operator(x) - self.measured(x)
        return -miss.square().flatten(1).sum(1) / (2 * self.sd**2)


class Inpainting(Measurement):
    """The pixels of a picture where a mask is white, each with noise: what is black is filled in.

    Args:
        image: the picture, as of `Measurement`.
        mask: white where it is known, a file or a tensor (h, w) or (3, h, w) in [0, 1].
        sd: as of `Measurement`.
        grey: as of `Measurement`.
    """

    def __init__(
        self,
        image: str | Path | Tensor,
        mask: str | Path | Tensor,
        sd: float = 0.1,
        grey: bool = False,
    ) -> None:
        super().__init__(image, sd, grey=grey)
        given = mask if isinstance(mask, Tensor) else luma(read(mask, "mask", ground=0.0))[0]
        given = given.expand(3, -1, -1) if given.ndim == 2 else given
        known = (given > 0.5).float()[None]
        self.register_buffer("mask", known[:, :1] if grey else known)
        self.mask: Tensor

    def operator(self, x: Tensor) -> Tensor:
        """Return the known pixels, zero elsewhere."""
        mask = self.mask.to(x)
        if mask.shape[-2:] != x.shape[-2:]:  # known: no unknown pixel is averaged in
            mask = (_resized(mask, x) > 1 - 1e-3).to(x)
        return mask * x


class SuperResolution(Measurement):
    """A picture's means over squares of `factor` pixels, each with noise.

    Args:
        image: the small picture, or a large one that is averaged down, as of `Measurement`.
        factor: side of a square, in pixels of the generated picture.
        sd: as of `Measurement`.
        grey: as of `Measurement`.
    """

    def __init__(
        self,
        image: str | Path | Tensor,
        factor: int = 4,
        sd: float = 0.1,
        grey: bool = False,
    ) -> None:
        super().__init__(image, sd, grey=grey)
        if not isinstance(factor, int) or factor < 2:
            raise ValueError(f"factor must be a whole number, 2 or more, got {factor}")
        self.factor = factor

    def operator(self, x: Tensor) -> Tensor:
        """Return the means over squares, (n, 3, h / factor, w / factor)."""
        if x.shape[-1] % self.factor or x.shape[-2] % self.factor:
            raise ValueError(
                f"pictures of {x.shape[-2]}x{x.shape[-1]} do not divide into squares of "
                f"{self.factor}: give a factor that does"
            )
        return F.avg_pool2d(x, self.factor)

    def measured(self, like: Tensor) -> Tensor:
        """Return the picture unchanged if it has the small size, else averaged down."""
        small = [side // self.factor for side in like.shape[-2:]]
        if list(self.image.shape[-2:]) == small:
            return self.image.to(like)
        if any(a < b for a, b in zip(self.image.shape[-2:], small, strict=True)):
            raise ValueError(
                f"the measured picture has {self.image.shape[-2]}x{self.image.shape[-1]} pixels, "
                f"fewer than the {small[0]}x{small[1]} squares of {self.factor} in what is drawn: "
                "give a larger factor, or the picture in that size"
            )
        return super().measured(like)


class Deblurring(Measurement):
    """A picture blurred by a Gaussian, each pixel with noise.

    Args:
        image: the sharp picture that is blurred here; with `blurred`, the blurred one.
        width: standard deviation of the blur, in pixels of the generated picture.
        sd: as of `Measurement`.
        blurred: whether `image` is blurred already.
        grey: as of `Measurement`.
    """

    def __init__(
        self,
        image: str | Path | Tensor,
        width: float = 2.0,
        sd: float = 0.1,
        blurred: bool = False,
        grey: bool = False,
    ) -> None:
        super().__init__(image, sd, grey=grey)
        self.width, self.blurred = _above("width", width), blurred

    def operator(self, x: Tensor) -> Tensor:
        """Return the blurred picture; edge pixels are repeated at the border."""
        return gaussian_blur(x, self.width)

    def measured(self, like: Tensor) -> Tensor:
        """Return the blurred picture."""
        image = _resized(self.image, like)
        return image if self.blurred else self.operator(image)


def gaussian_blur(x: Tensor, width: float) -> Tensor:
    """Blur pictures (n, c, h, w) by a Gaussian of a standard deviation in pixels."""
    from torchvision.transforms.functional import gaussian_blur as blur

    reach = min(max(1, round(3 * width)), min(x.shape[-2:]) - 1)
    return blur(x, [2 * reach + 1, 2 * reach + 1], [width, width])


def _above(name: str, value: float) -> float:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be above zero and finite, got {value}")
    return value


def _resized(image: Tensor, like: Tensor) -> Tensor:
    image = image.to(like)
    if image.shape[-2:] == like.shape[-2:]:
        return image
    with torch.no_grad():
        return F.interpolate(image, like.shape[-2:], mode="bilinear", antialias=True)
