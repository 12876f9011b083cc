"""Rewards of form: mirror symmetry, mirror antisymmetry, and where on the sheet the ink lies."""

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from rewards.pixels.reading import PixelReward, drawing, ink, luma, read, rms
from steer.reward import unknown

__all__ = ["REGIONS", "Antisymmetry", "Layout", "Symmetry"]

_AXES = {"vertical": -1, "horizontal": -2}


def _side(axis: str) -> int:
    """Return the dimension that a mirror reverses."""
    if axis not in _AXES:
        raise unknown("axis", str(axis), _AXES)
    return _AXES[axis]


class Symmetry(PixelReward):
    """Mirror symmetry, from -1 to 0: minus the RMS difference of the picture and its mirror.

    `-sqrt(mean_pc (x_pc - mirror(x)_pc)^2)` over pixels p and channels c; 0 where the halves
    agree in every pixel.

    Known hack: an empty picture, or any plain one, scores 0; so does a pale drawing, nearly. Add a
    reward for the content of the picture.

    Args:
        axis: the mirror's line: "vertical" compares left and right, "horizontal" top and bottom.

    Raises:
        ValueError: another axis; the message has the nearest names.
    """

    def __init__(self, axis: str = "vertical") -> None:
        super().__init__()
        self.axis, self._dim = axis, _side(axis)

    def measure(self, x: Tensor) -> Tensor:
        """Score pictures (n, 3, h, w) in [0, 1] -> (n,) in [-1, 0]."""
        return -rms(x - x.flip(self._dim))


class Antisymmetry(PixelReward):
    """How far the halves of the drawing are each other's negatives, from 0 (not at all) to 1.

    With luma y and its mirror m, the negative is `y + m = 1`, and the score is the odd share of
    the drawing's contrast to mid-grey:
    `sum_p w_p (y_p - m_p)^2 / (sum_p w_p ((y_p - m_p)^2 + (y_p + m_p - 1)^2) + k)`,
    with `w_p` whether p or its mirror image belongs to the drawing (0 to 1, without a gradient),
    so that white ground against white ground counts for nothing, and `k` 1 % of the pixels, so
    that an empty picture scores 0, as symmetric and mid-grey ones do.

    Known hack: a dark blob in one half, across from empty ground.

    Args:
        axis: the mirror's line: "vertical" compares left and right, "horizontal" top and bottom.

    Raises:
        ValueError: another axis; the message has the nearest names.
    """

    def __init__(self, axis: str = "vertical") -> None:
        super().__init__()
        self.axis, self._dim = axis, _side(axis)

    def measure(self, x: Tensor) -> Tensor:
        """Score pictures (n, 3, h, w) in [0, 1] -> (n,) in [0, 1)."""
        y, weight = luma(x), drawing(x)
        m, weight = y.flip(self._dim), torch.maximum(weight, weight.flip(self._dim))
        odd, even = (y - m).square(), (y + m - 1).square()
        k = 0.01 * y[0].numel()
        return (weight * odd).sum((1, 2)) / ((weight * (odd + even)).sum((1, 2)) + k)


def _grid(rows: str, columns: str) -> Tensor:
    """Return a 4 x 4 mask: 1 where both the row and the column are '1'."""
    a, b = (torch.tensor([float(c) for c in word]) for word in (rows, columns))
    return a[:, None] * b


_GRIDS = {
    "left": _grid("1111", "1100"),
    "right": _grid("1111", "0011"),
    "top": _grid("1100", "1111"),
    "bottom": _grid("0011", "1111"),
    "centre": _grid("0110", "0110"),
}
REGIONS = tuple(_GRIDS)
"""The regions: the halves, and the middle half of the height by the middle half of the width."""


class Layout(PixelReward):
    """How much of the ink lies inside a region, from 0 (none) to 1 (all of it).

    `sum_p m_p i_p / (sum_p i_p + k)` with the ink `i_p = 1 - min(R, G, B)`, how far the pixel is
    from the white background; `m_p` the mask, resized to the picture by means over areas; `k` 1 %
    of the pixels, so that an empty picture scores 0.

    Known hack: a flat dark patch over the region, whatever the picture shows; and what is outside
    need only pale, for ink counts by its darkness.

    Args:
        region: one of `REGIONS`: left, right, top, bottom, centre.
        mask: instead of a region, a greyscale picture file: white is inside, black or transparent
            is outside, grey is partly inside. It is stretched over the picture.

    Raises:
        ValueError: another region; neither or both of region and mask; a mask that is no picture
            or has nothing inside.
        FileNotFoundError: no such mask.
    """

    def __init__(self, region: str | None = None, mask: str | Path | None = None) -> None:
        super().__init__()
        if (region is None) == (mask is None):
            raise ValueError(
                f"layout takes either region=NAME ({', '.join(REGIONS)}) or mask=FILE, got "
                f"{'neither' if region is None else 'both'}: give one"
            )
        if mask is not None:
            inside = luma(read(mask, "mask", ground=0.0))
            if not inside.any():
                raise ValueError(
                    f"the mask {str(mask)!r} is completely black: paint the inside white"
                )
        elif region in _GRIDS:
            inside = _GRIDS[region][None]
        else:
            raise unknown("region", str(region), REGIONS)
        self.register_buffer("mask", inside)
        self.mask: Tensor

    def measure(self, x: Tensor) -> Tensor:
        """Score pictures (n, 3, h, w) in [0, 1] -> (n,) in [0, 1)."""
        h, w = x.shape[-2:]
        mask, i = F.adaptive_avg_pool2d(self.mask.to(x), (h, w)), ink(x)
        return (mask * i).sum((1, 2)) / (i.sum((1, 2)) + 0.01 * h * w)
