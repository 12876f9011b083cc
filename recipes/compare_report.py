"""The results of `steer compare`: a table, the numbers, plots and a sheet."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from recipes.data import emoji
from recipes.data.recolour import plain_label
from recipes.entries import Entry
from recipes.exact_tilt import tilt_table
from recipes.figures import Estimate, estimate, markdown, pairwise_distance
from recipes.plots.compared import plot_compared, settings_of
from steer.files import numbers
from steer.pictures import captioned_grid, save_picture

__all__ = ["KINDS", "Measured", "kind", "write"]

KINDS = ("specific", "broad")
SHOWN = 12  # columns of the sheet
NONE = Estimate(None, None)
SCORES = ("reward", "judge", "top1")  # the last two only with a judge


def kind(prompt: str) -> str:
    """Return whether a prompt names a concept ("specific") or leaves it open ("broad").

    >>> [kind(p) for p in ("fox", "blue flat fox", "bird", "red fruit", "")]
    ['specific', 'specific', 'broad', 'broad', 'broad']
    """
    data = emoji.load()
    styles = {word for style in emoji.STYLES.values() for word in style.split()}
    bare = " ".join(w for w in prompt.split() if w not in styles)
    named = {bare, plain_label(bare)} & {*data.concepts, *map(plain_label, data.concepts)}
    open_words = {*data.groups, *data.subgroups}
    return "broad" if not named or named & open_words else "specific"


@dataclass(frozen=True)
class Measured:
    """The measurements of a row: tensors (prompts, seeds, k, ...), and the cost of a picture."""

    tensors: dict[str, Tensor]
    nfe: float
    seconds: float

    @property
    def names(self) -> list[str]:
        """The names of its scores."""
        return [name for name in SCORES if name in self.tensors]

    def replicates(self, name: str) -> Tensor:
        """Return the mean over each prompt's pictures, (p,); for a single prompt, each seed's."""
        values = self.tensors[name].mean(2)
        return values[0] if len(values) == 1 else values.mean(1)

    @property
    def diversity(self) -> Tensor:
        """Return the mean distance between each prompt's pictures, (p,)."""
        return torch.tensor([pairwise_distance(f.flatten(0, 1)) for f in self.tensors["features"]])


def _summary(
    rows: Mapping[str, Measured], base: str | None, where: Tensor
) -> dict[str, dict[str, Estimate]]:
    """Return each row's estimates over a subset of the prompts."""
    made = {}
    for label, row in rows.items():
        values = {name: row.replicates(name) for name in row.names} | {"diversity": row.diversity}
        for name in (n for n in row.names if n != "top1"):
            below = torch.nan if base in (None, label) else rows[base].replicates(name)
            values[f"{name} - none"] = values[name] - below
        made[label] = {
            name: estimate(v[where] if len(where) > 1 else v) for name, v in values.items()
        }
        made[label]["nfe"] = Estimate(row.nfe, None)
    return made


def write(
    folder: Path,
    rows: Sequence[Entry],
    prompts: Sequence[str],
    kinds: Sequence[str],
    gathered: Sequence[Measured],
    reward: str = "reward",
    tilts: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Write tables, figures, plots, and pictures, or samples of a model without pictures.

    Args:
        folder: the target folder.
        rows: the rows that were compared.
        prompts: the prompts.
        kinds: kind of each prompt: one of `KINDS`, or "all" if it is not known.
        gathered: the measurements of each row.
        reward: name of the reward, for the axes.
        tilts: the exact tilts, if the model has them.
    """
    named = {entry.label: row for entry, row in zip(rows, gathered, strict=True)}
    base = next((e.label for e in rows if e.method == "none"), None)
    parts = {k: torch.tensor([k == one for one in kinds]) for k in KINDS if k in kinds}
    if len(parts) != 1:
        parts["all"] = torch.ones(len(kinds), dtype=torch.bool)
    summaries = {k: _summary(named, base, where) for k, where in parts.items()}
    table = _table(summaries, kinds, gathered) + ("\n" + tilt_table(tilts) if tilts else "")
    (folder / "table.md").write_text(table, encoding="utf-8")
    entries = dict(zip(named, rows, strict=True))
    figures = {
        "reward": reward,
        "prompts": [{"prompt": p, "kind": k} for p, k in zip(prompts, kinds, strict=True)],
        "methods": {
            label: {
                **settings_of(entries[label]),
                "nfe": row.nfe,
                "seconds": row.seconds,
                "summary": {k: {n: e._asdict() for n, e in s[label].items()}
                            for k, s in summaries.items()},
                **{n: row.tensors[n].mean(2) for n in row.names},
                "diversity": row.diversity,
            }
            for label, row in named.items()
        },
        "exact_tilts": [
            {n: v._asdict() if isinstance(v, Estimate) else v for n, v in row.items()}
            for row in tilts
        ],
    }  # fmt: skip
    known = numbers(figures)
    (folder / "figures.json").write_text(json.dumps(known, indent=1), encoding="utf-8")
    plot_compared(known, folder)
    if any("samples" in row.tensors for row in gathered):
        samples = {label: row.tensors["samples"] for label, row in named.items()}
        (folder / "samples.safetensors").write_bytes(safetensors.torch.save(samples))
        return
    pictures = {
        label: row.tensors["images"].clamp(0, 1).mul(255).round().byte()
        for label, row in named.items()
    }
    (folder / "pictures.safetensors").write_bytes(safetensors.torch.save(pictures))
    step = max(1, math.ceil(len(prompts) / SHOWN))
    grid = []
    for label, row in named.items():
        shown = row.tensors["images"][::step, 0, 0]
        scores = row.tensors["reward"][::step, 0, 0].tolist()
        captions = [f"{s:.3f} {p}" for s, p in zip(scores, prompts[::step], strict=True)]
        grid.append((label, shown, captions))
    save_picture(captioned_grid(grid), folder / "sheet.png")


def _table(
    summaries: Mapping[str, Mapping[str, Any]], kinds: Sequence[str], rows: Sequence[Measured]
) -> str:
    """Return the tables, one for each kind of prompts."""
    titles = {"reward": "reward", "judge": "judge", "top1": "judge: 1 of 100",
              "reward - none": "reward - none", "judge - none": "judge - none",
              "diversity": "diversity"}  # fmt: skip
    blocks = []
    for k, summary in summaries.items():
        count = len(kinds) if k == "all" else kinds.count(k)
        first, *_ = summary.values()
        known = [n for n in titles if n in first and any(e[n] != NONE for e in summary.values())]
        shown = [n for n in known if n != "top1" or k == "specific"]
        cells = [
            [label, f"{e['nfe'].mean:g}", *(e[n] for n in shown)] for label, e in summary.items()
        ]
        header = ["method", "NFE a picture", *(titles[n] for n in shown)]
        title = f"## {k} prompts ({count} x {rows[0].tensors['reward'].shape[1]} seeds)"
        blocks.append(f"{title}\n\n{markdown(header, cells)}\n")
    blocks.append(
        "Mean ± standard error over prompts, each prompt's seeds averaged first, or over a single "
        "prompt's seeds. NFE:\nnetwork calls of all particles, and those that set a "
        "temperature, for one final picture: the particle with the\nhighest reward, and with none "
        "or keep=all each particle. Differences are paired. Diversity: mean distance\nbetween the "
        "pictures of one prompt, by the judge's features, or by averaged pixels where it has "
        "none.\n"
    )
    return "\n".join(blocks)
