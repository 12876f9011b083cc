"""Captioned contact sheets: pictures in rows, a line of text under each."""

import os
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

__all__ = ["contact_sheet"]


def contact_sheet(
    images: Tensor, captions: Sequence[str], out: Path, columns: int = 12, side: int = 96
) -> None:
    """Write pictures (n, 3, h, w) in [0, 1] (clamped here) with their captions, whole or not."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(size=10)
    pixels = (images.detach().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    rows, cell = -(-len(pixels) // columns), (side + 4, side + 18)
    sheet = Image.new("RGB", (columns * cell[0], rows * cell[1]), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (picture, caption) in enumerate(zip(pixels, captions, strict=True)):
        x, y = i % columns * cell[0] + 2, i // columns * cell[1] + 2
        scaled = Image.fromarray(picture).resize((side, side), Image.Resampling.NEAREST)
        sheet.paste(scaled, (x, y))
        draw.text((x, y + side), (caption or "(no prompt)")[: side // 5], "black", font)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    sheet.save(partial, format="PNG")
    os.replace(partial, out)
