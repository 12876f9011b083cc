"""Random shifts of pictures on white within their blank margin, so that no ink is cut off."""

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["Draw", "margins", "shifted"]

Draw = Callable[[int, torch.Generator], tuple[Tensor, str]]
"""(index, generator) -> (a picture (3, h, w) in [0, 1], its caption)."""


def margins(images: Tensor, most: int) -> Tensor:
    """Return the blank rows above and below, columns left and right, (n, 4), at most `most`.

    Args:
        images: on white, (n, 3, h, w) in [0, 1].
        most: in pixels.
    """
    ink = (images < 0.99).any(1)
    rows, columns = ink.any(2).int(), ink.any(1).int()
    found = [rows.argmax(1), rows.flip(1).argmax(1)]
    found += [columns.argmax(1), columns.flip(1).argmax(1)]
    return torch.stack(found, 1).clamp(max=most)


def shifted(images: Tensor, draw: Draw, shift: int = 2) -> Draw:
    """Return a sampler whose pictures are shifted by up to `shift` whole pixels in each direction.

    Args:
        images: picture i itself, or one with more ink than any variant of it, (n, 3, h, w).
        draw: samples picture i or a variant of it.
        shift: in pixels; a picture's own margin may allow less.
    """
    room = margins(images, shift)

    def moved(i: int, generator: torch.Generator) -> tuple[Tensor, str]:
        picture, caption = draw(i, generator)
        by = [
            int(torch.randint(-before, after + 1, (), generator=generator))
            for before, after in room[i].reshape(2, 2).tolist()
        ]
        return picture.roll(by, (1, 2)), caption

    return moved
