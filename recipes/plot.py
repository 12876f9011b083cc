"""`steer plot`: draw the plots of a run folder again, with a dark theme or as SVG."""

import json
from functools import partial
from pathlib import Path
from typing import Literal

from recipes.plots.charts import front
from recipes.plots.compared import plot_compared
from recipes.plots.style import Format, save
from recipes.terminal import say
from steer.files import expanded

__all__ = ["plot"]


def plot(
    run: Path,
    theme: Literal["light", "dark"] = "light",
    formats: list[Format] = ["png", "svg"],  # noqa: B006
    out: Path | None = None,
) -> list[Path]:
    """Draw the plots of a comparison or of a tuning run again, from the numbers in its folder.

    Args:
        run: the folder of `steer compare` (figures.json) or of `steer finetune` (front.json).
        theme: light or dark; the names of dark plots end in `_dark`.
        formats: file formats: png for a page, svg for a paper.
        out: the folder for the plots. Default: that of the run; files of the same name are
            replaced.

    Returns:
        The files.
    """
    run = expanded(run)
    folder = run if out is None else expanded(out)
    suffix = "_dark" if theme == "dark" else ""
    figures, entries = run / "figures.json", run / "front.json"
    found = next((file for file in (figures, entries) if file.is_file()), None)
    if found is None:
        raise FileNotFoundError(
            f"{run} contains neither figures.json nor front.json: give the folder of steer "
            "compare, or of steer finetune with a sweep"
        )
    try:
        numbers = json.loads(found.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{found} is not JSON ({error}): run its command again") from error
    folder.mkdir(parents=True, exist_ok=True)
    if found == figures:
        made = plot_compared(numbers, folder, theme, formats, suffix)
    else:
        made = save(partial(front, numbers), folder / f"front{suffix}.png", theme, formats)
    for file in made:
        say(str(file))
    return made
