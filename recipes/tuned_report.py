"""The results of `steer eval --lora`: a table, the numbers, a front and a sheet."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recipes.figures import Estimate, estimate, markdown
from recipes.plots.charts import Point, tuned_fronts
from recipes.plots.style import save
from recipes.tuned_rows import Row
from steer.files import numbers
from steer.pictures import captioned_grid, save_picture
from steer.tuning.alarms import HELD_OUT
from steer.tuning.statistics import Drift, diversity, kid

__all__ = ["Measured", "Report", "share"]

SHOWN = 8  # columns of the sheet


@dataclass(frozen=True)
class Measured:
    """The measurements of a row: tensors (prompts, seeds * k, ...), and the cost of a picture."""

    tensors: dict[str, Tensor]
    nfe: float
    seconds: float

    @property
    def names(self) -> list[str]:
        """The names of its scores."""
        return [name for name in self.tensors if name not in ("images", "features")]

    def per_prompt(self, name: str) -> Tensor:
        """Return the mean over each prompt's pictures, (p,)."""
        return self.tensors[name].mean(1)

    @property
    def diversity(self) -> Tensor:
        """Return the diversity of each prompt, (p,); NaN for a single picture."""
        p, n = self.tensors["features"].shape[:2]
        flat = self.tensors["features"].flatten(0, 1)
        return diversity(flat, p) if n > 1 else torch.full((p,), torch.nan)

    def kid(self, other: "Measured") -> tuple[float, float]:
        """Return the kernel distance of the pictures, and its spread over subsets."""
        a, b = (m.tensors["features"].flatten(0, 1) for m in (self, other))
        many = min(len(a), len(b)) > 1
        return kid(a, b, paired=len(a) == len(b)) if many else (math.nan, math.nan)


def share(values: Tensor, of: Tensor) -> Estimate:
    """Return the ratio of two means (n,) of pairs, and its standard error to first order.

    >>> share(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 4.0]))
    Estimate(mean=0.5, error=0.0)
    """
    a, b = values.double(), of.double()
    if a.isnan().any() or b.isnan().any() or not float(b.mean()):
        return Estimate(None, None)
    ratio = float(a.mean() / b.mean())
    rest = estimate(a - ratio * b).error
    return Estimate(ratio, None if rest is None else rest / abs(float(b.mean())))


class Report:
    """The numbers of all rows, as a table, a file, a plot and a sheet."""

    def __init__(
        self,
        rows: Sequence[Row],
        measured: Mapping[str, Measured],
        prompts: Sequence[str],
        drifts: Mapping[tuple[str, float], Drift],
    ) -> None:
        self.rows, self.measured, self.prompts, self.drifts = rows, measured, prompts, drifts
        self.guided = [r for r in rows if not r.plain and not r.adapter]
        own = [r for r in self.guided if r.section is None]
        self.first = (own or self.guided or [None])[0]  # type: ignore[list-item]
        self.summaries = {row.label: self._summary(row) for row in rows}

    def base(self, row: Row) -> Measured:
        """Return the base with the same number of steps."""
        return self.measured[Row("none", row.steps).label]

    def difference(self, row: Row, other: Row, name: str) -> Estimate:
        """Return the paired difference of two rows' scores."""
        a, b = (self.measured[r.label].per_prompt(name) for r in (row, other))
        return estimate(a - b)

    def _summary(self, row: Row) -> dict[str, Estimate]:
        mine = self.measured[row.label]
        made = {"nfe": Estimate(mine.nfe, None)}
        made |= {name: estimate(mine.per_prompt(name)) for name in mine.names}
        made["diversity"] = estimate(mine.diversity)
        made["kept"] = share(mine.diversity, self.base(row).diversity)
        distance, _ = mine.kid(self.base(row))
        made["kid"] = Estimate(None if math.isnan(distance) else distance, None)
        if self.first is not None and row.adapter:
            for name in ("reward", "judge"):
                if name in mine.names:
                    made[f"{name} - guided"] = self.difference(row, self.first, name)
        return made

    def write(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """Write everything."""
        text = json.dumps(numbers({**settings, **self.figures()}), indent=1, ensure_ascii=False)
        (folder / "metrics.json").write_text(text, encoding="utf-8")
        (folder / "table.md").write_text(self.table(settings), encoding="utf-8")
        self.front(folder / "front.png")
        save_picture(captioned_grid(self.sheet()), folder / "sheet.png")

    def figures(self) -> dict[str, Any]:
        """Return every number: rows by label, and tuned minus each guided row."""
        rows = {}
        for row in self.rows:
            mine = self.measured[row.label]
            distance, spread = mine.kid(self.base(row))
            drift = self.drifts.get((row.adapter, row.scale)) if row.adapter else None
            rows[row.label] = {
                "adapter": row.adapter, "scale": row.scale if row.adapter else 0.0,
                "method": row.method, "steps": row.steps, "section": row.section,
                "nfe": mine.nfe, "seconds": mine.seconds,
                "summary": {n: e._asdict() for n, e in self.summaries[row.label].items()},
                "kid": {"mean": distance, "spread": spread},
                "drift": None if drift is None else drift._asdict(),
                "per_prompt": {n: mine.per_prompt(n) for n in mine.names}
                | {"diversity": mine.diversity},
            }  # fmt: skip
        names = [n for n in ("reward", "judge") if n in self.measured[self.rows[0].label].names]
        against = {
            row.label: {
                other.label: {n: self.difference(row, other, n)._asdict() for n in names}
                for other in self.guided
            }
            for row in self.rows
            if row.adapter
        }
        return {
            "prompts": list(self.prompts),
            "guided": self.first and self.first.label,
            "rows": rows,
            "tuned - guided": against,
        }

    def table(self, settings: Mapping[str, Any]) -> str:
        """Return the tables: one per number of steps, and one for rows with their own cost."""
        scores = self.measured[self.rows[0].label].names
        minus = [n for n in ("reward - guided", "judge - guided")
                 if any(n in s for s in self.summaries.values())]  # fmt: skip
        header = ["method", "NFE a picture", *(n.removeprefix(HELD_OUT) for n in scores), *minus,
                  "diversity", "of the base's", "KID", "drift: velocity, jump"]  # fmt: skip
        blocks = []
        for section in [*dict.fromkeys(r.section for r in self.rows if r.section), None]:
            cells = []
            for row in (r for r in self.rows if r.section == section):
                found, drift = self.summaries[row.label], self.drifts.get((row.adapter, row.scale))
                shown = [found.get(n, Estimate(None, None))
                         for n in (*scores, *minus, "diversity", "kept", "kid")]  # fmt: skip
                away = f"{drift.velocity:.3f}, {drift.jump:.3f}" if row.adapter and drift else "–"
                cells.append([row.label, f"{found['nfe'].mean:g}", *shown, away])
            title = f"at {section} NFE" if section else "at their own NFE"
            if cells:
                blocks.append(f"## Rows {title}\n\n{markdown(header, cells)}\n")
        p, n, m = len(self.prompts), settings["particles"], settings["seeds"]
        beside = f' "- guided" subtracts {self.first.label}, paired.' if self.first else ""
        blocks.append(
            f"{p} prompts x {n} pictures x {m} seed{'s' * (m > 1)}, reward "
            f"`{settings['reward']}`; mean ± standard error over prompts, each prompt's pictures "
            f"averaged first.\nAll rows begin with the same noise.{beside} Diversity: mean "
            "distance of the judge's features between\nthe pictures of a prompt, its share of "
            "the base's by as many steps, and KID to those. NFE: network calls for one\nreturned "
            "picture; a row that cannot use all calls of its table has fewer. Drift: relative "
            "distance from the base's\nvelocity, and from its one jump.\n"
        )
        return "\n".join(blocks)

    def front(self, out: Path) -> None:
        """Plot reward and judge against diversity: a line per adapter, a column per step count.

        Lines start at the base, which is scale 0. The file is written as a PNG and as an SVG.
        """
        found = self.summaries
        scores = [y for y in ("reward", "judge") if y in found[self.rows[0].label]]
        sections: dict[str, dict[str, dict[str, list[Point]]]] = {}

        def points(rows: Sequence[Row], y: str) -> list[Point]:
            return [
                Point(r.adapter if r.plain and r.adapter else r.label,
                      found[r.label]["diversity"], found[r.label][y], {"scale": r.scale})
                for r in rows
            ]  # fmt: skip

        for k in dict.fromkeys(r.section for r in self.rows if r.section):
            here = [r for r in self.rows if r.section == k and r.plain]
            beside = [r for r in self.rows if not r.plain and r.section in (k, None)]
            sections[f"{k} step{'s' * (k > 1)}"] = {
                y: {
                    "base": points([r for r in here if not r.adapter], y),
                    "adapters": points([r for r in here if r.adapter], y),
                    "methods": points(beside, y),
                }
                for y in scores
            }
        save(partial(tuned_fronts, sections), out)

    def sheet(self) -> list[tuple[str, Tensor, list[str]]]:
        """Return some prompts' first pictures: base and tuned in the fewest steps, and guided."""
        fewest = min(r.section for r in self.rows if r.section)
        top = max(r.scale for r in self.rows if r.adapter)
        rows = [r for r in self.rows if r.plain and r.section == fewest]
        shown = [r for r in rows if not r.adapter or r.scale == top]
        shown += [] if self.first is None else [self.first]
        step = max(1, math.ceil(len(self.prompts) / SHOWN))
        made = []
        for row in shown:
            mine = self.measured[row.label].tensors
            scores = mine["reward"][::step, 0].tolist()
            names = [f"{s:.3f} {p}" for s, p in zip(scores, self.prompts[::step], strict=True)]
            made.append((f"{row.label}", mine["images"][::step, 0], names))
        return made
