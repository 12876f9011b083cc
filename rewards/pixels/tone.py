"""Rewards of tone: contrast, saturation, sharpness, smoothness."""

from torch import Tensor
from torch.nn import functional as F

from rewards.pixels.reading import PixelReward, drawing, luma, rms

__all__ = ["Contrast", "Saturation", "Sharpness", "Smoothness"]


class Contrast(PixelReward):
    """Standard deviation of luma y, `sqrt(mean_p (y_p - mean y)^2)`, from 0 to 0.5.

    0 is a plain picture; 0.5 one that is half black and half white.

    Known hack: black and white in equal parts, in whatever pattern.
    """

    def measure(self, x: Tensor) -> Tensor:
        """Score pictures (n, 3, h, w) in [0, 1] -> (n,) in [0, 0.5]."""
        y = luma(x)
        return rms(y - y.mean((1, 2), keepdim=True))


class Saturation(PixelReward):
    """Mean chroma of the drawing, from 0 (grey, or empty) to 1 (pure colours).

    `sum_p w_p c_p / (sum_p w_p + k)` over pixels p, with the chroma
    `c_p = max(R, G, B) - min(R, G, B)`, `w_p` how far the pixel is from the white background (0
    to 1, without a gradient) and `k` 5 % of the pixels, so that a speck does not count as a
    saturated drawing. The white ground does not count, so large pictures have no advantage.

    Known hack: flat neon areas of red, green, blue, cyan, magenta or yellow. An exactly grey
    pixel has no gradient: no hue is nearer than another.
    """

    def measure(self, x: Tensor) -> Tensor:
        """Score pictures (n, 3, h, w) in [0, 1] -> (n,) in [0, 1)."""
        weight, chroma = drawing(x), x.amax(1) - x.amin(1)
        k = 0.05 * weight[0].numel()
        return (weight * chroma).sum((1, 2)) / (weight.sum((1, 2)) + k)


class Sharpness(PixelReward):
    """RMS Laplacian of luma, from 0 (plain) to 1 (a chessboard of single pixels).

    `sqrt(mean_p L_p^2)` with `L_p` the mean of the four neighbours minus the pixel, a neighbour
    beyond the border being the pixel itself. A sharp edge scores more than a blurred one of the
    same height, which the mean gradient (see `Smoothness`) would not tell apart.

    Known hack: noise of single pixels.
    """

    def measure(self, x: Tensor) -> Tensor:
        """Score pictures (n, 3, h, w) in [0, 1] -> (n,) in [0, 1]."""
        y = luma(x)
        across = F.pad(y.diff(dim=2), (1, 1)).diff(dim=2)
        down = F.pad(y.diff(dim=1), (0, 0, 1, 1)).diff(dim=1)
        return rms((across + down) / 4)


class Smoothness(PixelReward):
    """Minus the total variation, from -1 (a chessboard of single pixels) to 0 (plain).

    `-sum_pc (|x_pc - right_pc| + |x_pc - below_pc|) / (6 h w)` over pixels p and channels c, with
    the neighbours to the right and below where there are any (Rudin, Osher, Fatemi 1992,
    "Nonlinear total variation based noise removal algorithms"). Flat areas with few, short edges
    score well; it is all the same whether an edge is sharp.

    Known hack: an empty picture, or any plain one, scores 0.
    """

    def measure(self, x: Tensor) -> Tensor:
        """Score pictures (n, 3, h, w) in [0, 1] -> (n,) in (-1, 0]."""
        across, down = x.diff(dim=3).abs(), x.diff(dim=2).abs()
        return -(across.sum((1, 2, 3)) + down.sum((1, 2, 3))) / (2 * x[0].numel())
