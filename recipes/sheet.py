"""Contact sheets as files."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from steer import pictures

__all__ = ["contact_sheet"]


def contact_sheet(
    images: Tensor, captions: Sequence[str], out: Path, columns: int = 12, side: int | None = None
) -> None:
    """Write pictures (n, 3, h, w), nominally in [0, 1], with their captions, atomically."""
    side = pictures.side_of(images) if side is None else side
    pictures.save_picture(pictures.contact_sheet(images, captions, columns, side), out)
