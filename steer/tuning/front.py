"""The front of a tuning run: what reward costs in diversity and drift, as a plot."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["plot_front"]


def plot_front(front: Sequence[Mapping[str, Any]], out: Path) -> None:
    """Plot reward and judge against diversity and kernel distance, a line a number of jumps.

    Args:
        front: entries with "scale", "steps", "reward", "kid" and, where they were read, "judge"
            and "diversity".
        out: the PNG, whole or not there.
    """
    from matplotlib.figure import Figure

    ys = [y for y in ("reward", "judge") if y in front[0]]
    xs = [x for x in ("diversity", "kid") if x in front[0]]
    figure = Figure(figsize=(4.2 * len(xs), 3.4 * len(ys)), layout="constrained")
    axes = figure.subplots(len(ys), len(xs), squeeze=False)
    for row, y in zip(axes, ys, strict=True):
        for axis, x in zip(row, xs, strict=True):
            for i, k in enumerate(dict.fromkeys(e["steps"] for e in front)):
                line = sorted((e for e in front if e["steps"] == k), key=lambda e: e["scale"])
                label = f"{k} step{'s' if k > 1 else ''}"
                axis.plot([e[x] for e in line], [e[y] for e in line], "o-", ms=3, label=label)
                if i == 0:
                    for e in line:
                        mark = f"{e['scale']:g}" + ("!" if e["alarms"] else "")
                        axis.annotate(mark, (e[x], e[y]), fontsize=7)
            axis.set(xlabel=x if x == "diversity" else "distance to the base (KID)", ylabel=y)
            axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=7)
    partial = out.with_name(f".{out.name}")
    figure.savefig(partial, dpi=110, format="png")
    partial.replace(out)
