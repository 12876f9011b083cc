"""Means with their errors, spread, tables and plots of what was measured."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Estimate", "estimate", "markdown", "pairwise_distance", "rate", "scatter"]


class Estimate(NamedTuple):
    """A mean and its standard error; None where the data have none.

    >>> print(Estimate(0.5, 0.01), Estimate(0.5, None), Estimate(None, None))
    0.5000 ± 0.0100 0.5000 –
    """

    mean: float | None
    error: float | None

    def __str__(self) -> str:
        if self.mean is None:
            return "–"
        digits = 4 if abs(self.mean) < 10 else 2
        beside = "" if self.error is None else f" ± {self.error:.{digits}f}"
        return f"{self.mean:.{digits}f}{beside}"


def estimate(values: Tensor) -> Estimate:
    """Return the mean of independent values (n,) and its standard error; NaNs are left out.

    >>> estimate(torch.tensor([1.0, 3.0, torch.nan]))
    Estimate(mean=2.0, error=1.0)
    """
    known = values[~values.isnan()].double()
    if not len(known):
        return Estimate(None, None)
    error = float(known.std()) / math.sqrt(len(known)) if len(known) > 1 else None
    return Estimate(float(known.mean()), error)


def rate(hits: Tensor | Sequence[bool]) -> Estimate:
    """Return the share of hits (n,) and its binomial standard error.

    >>> rate([True, False, True, False])
    Estimate(mean=0.5, error=0.25)
    """
    known = torch.as_tensor(hits).double()
    if not len(known):
        return Estimate(None, None)
    share = float(known.mean())
    return Estimate(share, math.sqrt(share * (1 - share) / len(known)))


def pairwise_distance(features: Tensor) -> float:
    """Return the mean Euclidean distance over the pairs of rows (n, d); NaN for a single row.

    >>> pairwise_distance(torch.tensor([[0.0, 0.0], [3.0, 4.0]]))
    5.0
    """
    return float(torch.pdist(features.float()).mean()) if len(features) > 1 else math.nan


def markdown(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a table in Markdown.

    >>> print(markdown(["a", "b"], [["x", 1]]))
    | a | b |
    |---|---|
    | x | 1 |
    """
    lines = [list(header), *([str(cell) for cell in row] for row in rows)]
    text = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([text[0], "|" + "---|" * len(header), *text[1:]])


def scatter(
    panels: Mapping[str, Mapping[str, tuple[Estimate, Estimate]]],
    labels: tuple[str, str],
    out: Path,
    logarithmic: bool = False,
    lines: Iterable[Sequence[str]] = (),
) -> None:
    """Plot named points with error bars, the panels side by side, as a PNG.

    Args:
        panels: title -> name -> (x, y); a name has the same colour in each panel, and a point
            without a mean is left out.
        labels: of the axes.
        out: the file.
        logarithmic: whether x is.
        lines: names to join, from the smallest x to the largest.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    names = list(dict.fromkeys(name for points in panels.values() for name in points))
    joined = list(lines)
    figure = Figure(figsize=(4.2 * len(panels) + 2.6, 4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, points) in zip(axes, panels.items(), strict=True):
        for name, (x, y) in points.items():
            if x.mean is None or y.mean is None:
                continue
            i = names.index(name)
            axis.errorbar(
                x.mean, y.mean, xerr=x.error, yerr=y.error, label=name, color=f"C{i % 10}",
                marker="osD^vP*X"[i // 10 % 8], capsize=2, linestyle="none",
            )  # fmt: skip
        axis.set(title=title, xlabel=labels[0], ylabel=labels[1])
        for line in joined:
            means = [(x.mean, y.mean) for x, y in (points[n] for n in line if n in points)]
            ends = sorted((x, y) for x, y in means if x is not None and y is not None)
            axis.plot(*zip(*ends, strict=True), color="grey", lw=0.8, ls=":", zorder=0)
        if logarithmic:
            axis.set_xscale("log")
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axis.xaxis.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.3)
    shown = {k: v for a in axes for v, k in zip(*a.get_legend_handles_labels(), strict=True)}
    if shown:
        figure.legend(list(shown.values()), list(shown), loc="outside right upper", fontsize=8)
    figure.savefig(out, dpi=110)
