"""Pictures as files with 8 bits per channel, captioned grids and contact sheets."""

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
"""Titles are truncated to this many pixels, or to the pictures below them if those are wider."""


def to_pil(image: Tensor) -> Image.Image:
    """Convert an image (3, h, w), nominally in [0, 1], to 8 bits; it is clamped only here."""
    pixels = image.detach().float().clamp(0, 1).mul(255).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def save_picture(image: Image.Image, path: Path) -> None:
    """Write a picture as a PNG, atomically; its folder is created."""
    data = io.BytesIO()
    image.save(data, "PNG")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, data.getvalue())


def captioned_grid(rows: Sequence[Row], size: int = 96) -> Image.Image:
    """Draw rows of pictures with a caption under each and a title above each row.

    Args:
        rows: (title, images, captions), of any lengths; a row with an empty title has no line
            for it. Titles are cut to their place; captions may take two lines.
        size: the side of a picture in pixels; small pictures are enlarged without smoothing.
    """
    font = ImageFont.load_default(12)
    gap, line = 6, 16
    columns = max(len(images) for _, images, _ in rows)
    most = max(columns * (size + gap), WIDEST)
    titles = [_cut(title, font, most) for title, _, _ in rows]
    widest = max(int(font.getlength(title)) for title in titles)
    width = max(columns * (size + gap) + gap, widest + 2 * gap)
    texts = [[_wrapped(text, font, size) for text in captions] for _, _, captions in rows]
    lines = [max(map(len, row), default=1) for row in texts]
    heights = [
        size + (bool(title) + n) * line + gap for title, n in zip(titles, lines, strict=True)
    ]
    sheet = Image.new("RGB", (width, sum(heights) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    top = gap
    for title, height, (_, images, _), captions in zip(titles, heights, rows, texts, strict=True):
        if title:
            draw.text((gap, top), title, fill="black", font=font)
        upper = top + line * bool(title)
        for j, (image, caption) in enumerate(zip(images, captions, strict=True)):
            left = gap + j * (size + gap)
            sheet.paste(_fitted(to_pil(image), size), (left, upper))
            draw.rectangle((left - 1, upper - 1, left + size, upper + size), outline="#dddddd")
            for k, text in enumerate(caption):
                place = left, upper + size + 1 + k * (line - 2)
                draw.text(place, text, fill="#333333", font=font)
        top += height
    return sheet


def _fitted(image: Image.Image, size: int) -> Image.Image:
    """Return a picture fitted into a square of this side, with its aspect ratio kept.

    A small picture is enlarged by a whole factor, so that each of its pixels is a square.
    """
    scale = size / max(image.size)
    scale = int(scale) if scale >= 1 else scale
    sides = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    fitted = image.resize(sides, Image.Resampling.NEAREST if scale >= 1 else None)
    if sides == (size, size):
        return fitted
    square = Image.new("RGB", (size, size), "white")
    square.paste(fitted, ((size - sides[0]) // 2, (size - sides[1]) // 2))
    return square


def side_of(images: Tensor) -> int:
    """Return the side at which pictures (..., h, w) are shown in a grid, in pixels.

    Small ones are enlarged by a whole factor.

    >>> import torch
    >>> [side_of(torch.zeros(3, n, n)) for n in (32, 28, 64, 128, 1024)]
    [96, 112, 128, 128, 256]
    """
    longer = max(images.shape[-2:])
    return min(longer * max(1, ceil(96 / longer)), 256)


def contact_sheet(
    images: Tensor, captions: Sequence[str], columns: int = 12, size: int = 96
) -> Image.Image:
    """Draw pictures (n, 3, h, w) in rows of `columns`, with a caption under each.

    Args:
        images: nominally in [0, 1].
        captions: one per picture; an empty one means that there was no prompt.
        columns: pictures per row.
        size: the side of a picture in pixels.
    """
    texts = [caption or "(no prompt)" for caption in captions]
    starts = range(0, len(images), columns)
    rows = [("", images[i : i + columns], texts[i : i + columns]) for i in starts]
    return captioned_grid(rows, size)


def _wrapped(
    text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int
) -> list[str]:
    """Return a caption on one or two lines, broken between words; the second line is truncated."""
    words = " ".join(text[: 2 * width].splitlines())
    first = _cut(words, font, width)
    if first == words:
        return [first]
    head = first if words[len(first)] == " " else first.rpartition(" ")[0]
    if not head.strip():  # one long word
        return [first]
    return [head, _cut(words[len(head) :].strip(), font, width)]


def _cut(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> str:
    """Return the text on one line, truncated to `width` pixels.

    No letter is narrower than a pixel, so a longer text is truncated before it is measured.
    """
    text = " ".join(text[: width + 1].splitlines())
    lengths = range(len(text) + 1)
    return text[: bisect_right(lengths, width, key=lambda n: ceil(font.getlength(text[:n]))) - 1]
