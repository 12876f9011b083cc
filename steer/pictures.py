"""Pictures as files: 8 bits a channel, captioned grids and contact sheets, written whole."""

import io
from bisect import bisect_right
from collections.abc import Sequence
from math import ceil
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from steer.files import write_atomically

__all__ = ["Row", "captioned_grid", "contact_sheet", "save_picture", "side_of", "to_pil"]

Row = tuple[str, Tensor, Sequence[str]]
"""A row of a grid: its title, images (n, 3, h, w) and a caption for each."""

WIDEST = 1200
"""Titles are cut to this many pixels, or to the pictures below them where those are wider."""


def to_pil(image: Tensor) -> Image.Image:
    """Turn an image (3, h, w), nominally in [0, 1], into 8 bits: clamped here, and only here."""
    pixels = image.detach().float().clamp(0, 1).mul(255).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def save_picture(image: Image.Image, path: Path) -> None:
    """Write a picture as a PNG that is there whole or not at all; its folder is made."""
    data = io.BytesIO()
    image.save(data, "PNG")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, data.getvalue())


def captioned_grid(rows: Sequence[Row], size: int = 96) -> Image.Image:
    """Draw rows of pictures with a caption under each and a title above each row.

    Args:
        rows: (title, images, captions), of any lengths; a row with an empty title has no line
            for it. Texts are cut to their place.
        size: the side of a picture in pixels; small pictures are enlarged without smoothing.
    """
    font = ImageFont.load_default(12)
    gap, line = 6, 16
    columns = max(len(images) for _, images, _ in rows)
    most = max(columns * (size + gap), WIDEST)
    titles = [_cut(title, font, most) for title, _, _ in rows]
    widest = max(int(font.getlength(title)) for title in titles)
    width = max(columns * (size + gap) + gap, widest + 2 * gap)
    heights = [size + (2 if title else 1) * line + gap for title in titles]
    sheet = Image.new("RGB", (width, sum(heights) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    top = gap
    for title, height, (_, images, captions) in zip(titles, heights, rows, strict=True):
        if title:
            draw.text((gap, top), title, fill="black", font=font)
        upper = top + line * bool(title)
        for j, (image, caption) in enumerate(zip(images, captions, strict=True)):
            left = gap + j * (size + gap)
            sheet.paste(_fitted(to_pil(image), size), (left, upper))
            draw.rectangle((left - 1, upper - 1, left + size, upper + size), outline="#dddddd")
            text = _cut(caption, font, size)
            draw.text((left, upper + size + 1), text, fill="#444444", font=font)
        top += height
    return sheet


def _fitted(image: Image.Image, size: int) -> Image.Image:
    """Return a picture in a square of this side, its own shape kept; small ones stay crisp."""
    scale = size / max(image.size)
    sides = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    fitted = image.resize(sides, Image.Resampling.NEAREST if scale >= 1 else None)
    if sides == (size, size):
        return fitted
    square = Image.new("RGB", (size, size), "white")
    square.paste(fitted, ((size - sides[0]) // 2, (size - sides[1]) // 2))
    return square


def side_of(images: Tensor) -> int:
    """Return the side at which pictures (..., h, w) are shown in a grid, in pixels.

    >>> import torch
    >>> side_of(torch.zeros(3, 32, 32)), side_of(torch.zeros(3, 1024, 768))
    (96, 256)
    """
    return min(max(96, *images.shape[-2:]), 256)


def contact_sheet(
    images: Tensor, captions: Sequence[str], columns: int = 12, size: int = 96
) -> Image.Image:
    """Draw pictures (n, 3, h, w) in rows of `columns`, with a caption under each.

    Args:
        images: nominally in [0, 1].
        captions: one a picture; an empty one says that there was no prompt.
        columns: pictures in a row.
        size: the side of a picture in pixels.
    """
    texts = [caption or "(no prompt)" for caption in captions]
    starts = range(0, len(images), columns)
    rows = [("", images[i : i + columns], texts[i : i + columns]) for i in starts]
    return captioned_grid(rows, size)


def _cut(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> str:
    """Return the text on one line, as much of it as `width` pixels hold.

    No letter is narrower than a pixel, so what is longer is cut before anything is measured.
    """
    text = " ".join(text[: width + 1].splitlines())
    lengths = range(len(text) + 1)
    return text[: bisect_right(lengths, width, key=lambda n: ceil(font.getlength(text[:n]))) - 1]
