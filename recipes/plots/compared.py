"""The plots of a comparison, from the numbers in its figures.json."""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from recipes.entries import Entry
from recipes.figures import Estimate
from recipes.plots.charts import Point, methods
from recipes.plots.style import FORMATS, save

__all__ = ["plot_compared", "settings_of"]

PLOTS = (
    ("nfe", "reward", "reward_nfe"),
    ("diversity", "reward", "reward_diversity"),
    ("reward", "judge", "judge_reward"),
)
"""x, y, file."""

TITLES = {"specific": "prompts that name a concept", "broad": "open prompts", "all": "all prompts"}


def settings_of(entry: Entry) -> dict[str, Any]:
    """Return the settings of a row from figures.json: method, steps, particles, options."""
    return {
        "method": entry.method,
        "steps": entry.steps,
        "particles": entry.particles,
        "options": dict(entry.options) | ({"keep": "all"} if entry.keep == "all" else {}),
    }


def plot_compared(
    figures: Mapping[str, Any],
    folder: Path,
    look: str = "light",
    formats: Sequence[str] = FORMATS,
    suffix: str = "",
) -> list[Path]:
    """Plot the rows of a comparison, one panel per kind of prompts.

    Args:
        figures: content of figures.json.
        folder: the target folder.
        look: "light" or "dark".
        formats: "png", "svg" or both.
        suffix: suffix of the files' names.

    Returns:
        The files: reward against calls and against diversity, and judge against reward. The last
        two have the exact tilts as a dashed line if the figures contain them.
    """
    rows = figures["methods"]
    first = next(iter(rows.values()))["summary"]
    kinds = [k for k in first if k != "all" or len(first) == 1]
    labels = {
        "nfe": "network calls a picture",
        "reward": f"reward: {_short(figures.get('reward', 'reward'))}",
        "judge": "held-out judge's score",
        "diversity": "diversity (feature distance)",
    }
    made = []
    for x, y, name in PLOTS:
        if any(y not in row["summary"][k] for row in rows.values() for k in kinds):
            continue
        panels = {
            TITLES[k]: [_point(label, row, row["summary"][k], x, y) for label, row in rows.items()]
            for k in kinds
        }
        exact = [
            Point(
                "exact tilt", Estimate(**row[x]), Estimate(**row[y]), {"strength": row["strength"]}
            )
            for row in figures.get("exact_tilts", ())
            if x in row and y in row
        ]
        draw = partial(methods, panels, (labels[x], labels[y]), log_x=x == "nfe", reference=exact)
        made += save(draw, folder / f"{name}{suffix}.png", look, formats)
    return made


def _point(label: str, row: Mapping[str, Any], summary: Any, x: str, y: str) -> Point:
    xs, ys = Estimate(**summary[x]), Estimate(**summary[y])
    if "method" not in row:  # written by a version without these entries
        return Point(label, xs, ys)
    name, particles = row["method"].rpartition(":")[2], row["particles"]
    fixed = ", ".join(f"{k} {v}" for k, v in row["options"].items())
    if name == "none":
        return Point(name, xs, ys, {"steps": row["steps"]}, fixed)
    if name == "best-of-n":
        steps = f"{row['steps']} step{'s' * (row['steps'] > 1)}"
        fixed = f"{steps}, {fixed}" if fixed else steps
        return Point(name, xs, ys, {"candidates": particles}, fixed)
    return Point(name, xs, ys, {"steps": row["steps"], "particles": particles}, fixed)


def _short(text: str) -> str:
    """Return a reward's name for an axis; for `file.py:Name` it is Name."""
    own = re.fullmatch(r".*\.py:(\w+)", text)
    text = own[1] if own else text
    return text if len(text) <= 40 else f"{text[:37]}..."
