"""Display in a notebook: HTML with embedded pictures, and a run folder that displays itself."""

import base64
import html
import io
from pathlib import Path

from PIL import Image

__all__ = ["Report", "page", "picture", "table"]

WIDEST, MOST = 900, 400_000
"""Maximum width in pixels, and maximum size in bytes, of displayed pictures."""


def picture(image: Image.Image) -> str:
    """Return an `<img>` with an embedded picture, scaled down if it is large.

    Args:
        image: any picture; it is not changed.
    """
    image = image.convert("RGB")
    width = min(image.width, WIDEST)
    while True:
        shown = image.resize((width, max(1, round(image.height * width / image.width))))
        data = io.BytesIO()
        shown.save(data, "PNG", optimize=True)
        if len(data.getvalue()) <= MOST or width < 100:
            break
        width = width * 3 // 4
    text = base64.b64encode(data.getvalue()).decode()
    return f'<img src="data:image/png;base64,{text}" width="{shown.width}">'


def table(markdown: str) -> str:
    r"""Return the table in a Markdown text as HTML, without the text around it.

    >>> table("| a | b |\n|---|---|\n| 1 | <2> |")
    '<table><tr><th>a</th><th>b</th></tr><tr><td>1</td><td>&lt;2&gt;</td></tr></table>'
    """
    lines = [line.strip() for line in markdown.splitlines() if line.strip().startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    rows = [row for row in rows if not all(set(cell) <= set("-: ") for cell in row)]
    made = ""
    for place, row in enumerate(rows):
        tag = "td" if place else "th"
        cells = "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)
        made += f"<tr>{cells}</tr>"
    return f"<table>{made}</table>"


def page(title: str, *parts: str) -> str:
    """Return HTML of a title, which is escaped, followed by parts, which are HTML already."""
    return "".join(f"<div>{part}</div>" for part in (f"<b>{html.escape(title)}</b>", *parts))


class Report(type(Path())):  # type: ignore[misc]
    """A folder that a comparison wrote. In a notebook it shows its table and its pictures."""

    def _repr_html_(self) -> str | None:
        """Show the table and up to two pictures; nothing for a path inside the folder."""
        folder = Path(self)
        text = folder / "table.md"
        if not text.is_file():
            return None
        parts = [table(text.read_text(encoding="utf-8"))]
        for file in sorted(folder.glob("*.png"))[:2]:
            with Image.open(file) as image:
                parts.append(picture(image))
        return page(str(folder), *parts)
