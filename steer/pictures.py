"""Run folders: pictures, a captioned grid, scores and metrics. Whole or absent."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

if TYPE_CHECKING:
    pass

__all__ = ["Row", "captioned_grid", "to_pil"]

Row = tuple[str, Tensor, Sequence[str]]

"""A row of a grid: its title, images (n, 3, h, w) and a caption for each."""


def to_pil(image: Tensor) -> Image.Image:
    """Turn an image (3, h, w), nominally in [0, 1], into 8 bits: clamped here, and only here."""
    pixels = image.detach().float().clamp(0, 1).mul(255).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def captioned_grid(rows: Sequence[Row], size: int = 96) -> Image.Image:
    """Draw rows of pictures with a caption under each and a title above each row.

    Args:
        rows: (title, images, captions), of any lengths.
        size: the side of a picture in pixels; small pictures are enlarged without smoothing.
    """
    font = ImageFont.load_default(12)
    gap, line = 6, 16
    columns = max(len(images) for _, images, _ in rows)
    titles = [int(font.getlength(title)) for title, _, _ in rows]
    width = max(columns * (size + gap) + gap, max(titles) + 2 * gap)
    row_height = size + 2 * line + gap
    sheet = Image.new("RGB", (width, len(rows) * row_height + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (title, images, captions) in enumerate(rows):
        top = i * row_height + gap
        draw.text((gap, top), title, fill="black", font=font)
        for j, (image, caption) in enumerate(zip(images, captions, strict=True)):
            left = gap + j * (size + gap)
            kind = Image.Resampling.NEAREST if image.shape[-1] <= size else None
            picture = to_pil(image).resize((size, size), kind)
            sheet.paste(picture, (left, top + line))
            box = (left - 1, top + line - 1, left + size, top + line + size)
            draw.rectangle(box, outline="#dddddd")
            while caption and font.getlength(caption) > size:
                caption = caption[:-1]
            draw.text((left, top + line + size + 1), caption, fill="#444444", font=font)
    return sheet
