"""Figures of the studio, with a transparent background for light and dark pages."""

from collections.abc import Sequence
from typing import Any

from recipes.plots.style import MARKERS, theme

__all__ = ["compared", "curves", "front_of"]

COLOURS = {"reward": "#0072b2", "judge": "#e69f00", "diversity": "#009e73"}
ALARM = "#d55e00"
GREY = "#8a8a8a"  # readable on light and on dark


def curves(checks: list[dict[str, Any]]) -> Any:
    """Return a figure of the readings, with a band at each alarm.

    Reward and judge share a panel; diversity has another unit, and its own panel below.
    """
    known = [n for n in COLOURS if all(isinstance(c.get(n), int | float) for c in checks)]
    panels = [[n for n in known if n != "diversity"], [n for n in known if n == "diversity"]]
    panels = [names for names in panels if names]
    figure, every = _axes("optimizer step", ["mean", "diversity"][: len(panels)])
    steps = [check["step"] for check in checks]
    for axes, names in zip(every, panels, strict=True):
        for name in names:
            values = [check[name] for check in checks]
            axes.plot(steps, values, marker="o", ms=4, label=name, color=COLOURS[name])
        before = 0
        for check in checks:
            if check.get("alarms"):
                axes.axvspan(before, check["step"], color=ALARM, alpha=0.2, lw=0)
            before = check["step"]
    if panels and len(panels[0]) > 1:
        every[0].legend(frameon=False, labelcolor=GREY)
    return figure


def front_of(entries: list[dict[str, Any]], chosen: float) -> Any:
    """Return a figure of reward and judge against the distance to the base, for all scales.

    Args:
        entries: entries of a front.json for one number of jumps.
        chosen: the scale to mark.
    """
    figure, (axes,) = _axes("distance to the model without adapters (KID)", ["mean"])
    for name in ("reward", "judge"):
        if name not in entries[0]:
            continue
        xs, ys = ([e[k] for e in entries] for k in ("kid", name))
        axes.plot(xs, ys, marker="o", label=name, color=COLOURS[name])
        for e, x, y in zip(entries, xs, ys, strict=True):
            if name == "reward":
                axes.annotate(f"{e['scale']:g}", (x, y), (5, 5), textcoords="offset points",
                              color=GREY, fontsize=8)  # fmt: skip
            if e["alarms"]:
                axes.plot([x], [y], marker="o", ms=12, mfc="none", mec=ALARM, ls="none")
            if e["scale"] == chosen:
                axes.plot([x], [y], marker="s", ms=11, mfc="none", mec=GREY, ls="none")
    axes.plot([], [], marker="s", ms=9, mfc="none", mec=GREY, ls="none", label="this scale")
    axes.plot([], [], marker="o", ms=10, mfc="none", mec=ALARM, ls="none", label="an alarm")
    axes.legend(frameon=False, labelcolor=GREY)
    return figure


def compared(rows: Sequence[Sequence[Any]]) -> Any:
    """Return a figure of rewards against network calls, with a colour and marker per method.

    Args:
        rows: label, network calls per prompt and reward of each row.
    """
    look = theme("light")  # colours that are readable on dark pages, too
    figure, (axes,) = _axes("network calls per picture", ["reward"])
    for i, (label, calls, reward, *_) in enumerate(rows):
        axes.plot([calls], [reward], ls="none", marker=MARKERS[i % len(MARKERS)], ms=8,
                  color=look.colour(i), label=label)  # fmt: skip
    figure.legend(frameon=False, labelcolor=GREY, loc="outside lower left", ncols=2, fontsize=9)
    return figure


def _axes(x: str, ys: Sequence[str]) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4, 1.7 + 1.3 * len(ys)), layout="constrained", dpi=160)
    figure.patch.set_alpha(0)
    every = list(figure.subplots(len(ys), 1, sharex=True, squeeze=False)[:, 0])
    for axes, y in zip(every, ys, strict=True):
        axes.patch.set_alpha(0)
        axes.set(ylabel=y)
        axes.tick_params(colors=GREY)
        axes.yaxis.label.set_color(GREY)
        for side, spine in axes.spines.items():
            spine.set_color(GREY)
            spine.set_visible(side in ("left", "bottom"))
    every[-1].set_xlabel(x, color=GREY)
    return figure, every
