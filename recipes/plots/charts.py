"""The charts: comparison of methods, the front of tuned adapters, training rules of maps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from recipes.figures import Estimate
from recipes.plots.style import MARKERS, Theme, logarithmic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["BASELINES", "Point", "curves", "front", "legend_of", "methods", "tuned_fronts"]

BASELINES = ("none", "best-of-n", "base")
"""Methods that others are compared with: always in grey."""

_PLACES = (((-5, 3), "right", "bottom"), ((5, -3), "left", "top"))  # of numbers, in turn
_MANY = 3  # a longer line labels only its first and last point
ERRORS = "bars: ± 1 standard error over prompts"


@dataclass(frozen=True)
class Point:
    """One row of a comparison.

    Attributes:
        method: the group in the legend: one colour, one shape, one line.
        x: its position.
        y: its position.
        settings: settings that may differ within the group, by name: "steps", "particles", "n".
        fixed: settings that define the group, as written after the method's name.
    """

    method: str
    x: Estimate
    y: Estimate
    settings: Mapping[str, float] = field(default_factory=dict)
    fixed: str = ""

    @property
    def group(self) -> tuple[str, str]:
        """The key that it shares with the points of its line."""
        return self.method, self.fixed

    @property
    def known(self) -> bool:
        """Whether both means are known."""
        return self.x.mean is not None and self.y.mean is not None


def legend_of(points: Sequence[Point]) -> tuple[str, str | None]:
    """Return a group's legend entry, and the setting in which its points differ.

    >>> a, b = (Point("reno", Estimate(1, None), Estimate(1, None), {"steps": k, "particles": 1})
    ...         for k in (4, 16))
    >>> legend_of([a, b])
    ('reno, 1 particle: 4 to 16 steps', 'steps')
    >>> legend_of([a])
    ('reno, 4 steps, 1 particle', None)
    """
    first = points[0]
    same, differing = [], []
    for name in first.settings:
        values = sorted({p.settings[name] for p in points if name in p.settings})
        if len(values) > 1:
            differing.append((name, f"{values[0]:g} to {values[-1]:g} {name}"))
        else:
            word = name.removesuffix("s") if values[0] == 1 else name
            same.append(f"{values[0]:g} {word}")
    head = ", ".join([first.method, *([first.fixed] if first.fixed else []), *same])
    if not differing:
        return head, None
    return f"{head}: {', '.join(text for _, text in differing)}", differing[0][0]


def methods(
    panels: Mapping[str, Sequence[Point]],
    labels: tuple[str, str],
    look: Theme,
    log_x: bool = False,
    reference: Sequence[Point] = (),
) -> "Figure":
    """Plot points with error bars in panels, with one colour, marker and line per method.

    If a group's points differ in a setting, such as the number of steps or candidates, it is
    written next to the points; with many points, next to the first and the last.

    Args:
        panels: title -> points; points without a mean are left out.
        labels: labels of the axes, with units.
        look: the colours.
        log_x: whether x is logarithmic.
        reference: points of a dashed line, in this order, in every panel.
    """
    from matplotlib.figure import Figure
    from matplotlib.patheffects import withStroke

    every: dict[tuple[str, str], list[Point]] = {}
    for points in panels.values():
        for point in points:
            every.setdefault(point.group, []).append(point)
    climbing = [g for g in every if g[0] not in BASELINES]
    styles: dict[tuple[str, str], dict[str, Any]] = {}
    for i, group in enumerate(climbing):
        styles[group] = {"color": look.colour(i), "marker": MARKERS[i % len(MARKERS)]}
    for i, group in enumerate(g for g in every if g[0] in BASELINES):
        shape = {"none": "x", "base": "*"}.get(group[0], "ph<>"[i % 4])
        styles[group] = {"color": look.faint, "marker": shape, "linestyle": ":"}
    columns = min(2, len(panels))
    lines = (len(styles) + bool(reference) + 1) / columns
    size = 4.0 * len(panels) + 0.4, 3.4 + 0.2 * lines
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    handles: dict[str, Any] = {}
    for axis, (title, points) in zip(axes, panels.items(), strict=True):
        for i, (group, style) in enumerate(styles.items()):
            label, differing = legend_of(every[group])
            mine = [p for p in points if p.group == group and p.known]
            if differing:  # the line follows the setting that varies
                mine.sort(key=lambda p: p.settings[differing])
            if not mine:
                continue
            drawn = axis.errorbar(
                [p.x.mean for p in mine], [p.y.mean for p in mine],
                xerr=[p.x.error or 0 for p in mine] if any(p.x.error for p in mine) else None,
                yerr=[p.y.error or 0 for p in mine], capsize=0, elinewidth=0.8, **style,
            )  # fmt: skip
            handles[label] = drawn
            ends = mine if len(mine) <= _MANY else [mine[0], mine[-1]]
            for p in ends if differing else []:
                beside, across, along = _PLACES[i % 2]
                number = axis.annotate(
                    f"{p.settings[differing]:g}", (p.x.mean, p.y.mean), beside,  # type: ignore[index, arg-type]
                    textcoords="offset points", ha=across, va=along, fontsize=7.5,
                    color=style["color"],
                )  # fmt: skip
                number.set_path_effects([withStroke(linewidth=2.5, foreground=look.paper)])
        if reference:
            (handles[legend_of(reference)[0]],) = axis.plot(
                [p.x.mean for p in reference], [p.y.mean for p in reference],  # type: ignore[arg-type]
                color=look.ink, linestyle="--", marker=".", linewidth=1, zorder=1,
            )  # fmt: skip
        axis.set(title=title, xlabel=labels[0], ylabel=labels[1])
        if log_x:
            logarithmic(axis, [p.x.mean for p in points if p.x.mean])
    below(figure, handles, columns=columns, note=ERRORS)
    return figure


def below(figure: "Figure", handles: Mapping[str, Any], columns: int = 1, note: str = "") -> None:
    """Put one legend for all panels below them, with a note as its last entry."""
    from matplotlib.lines import Line2D

    shown = dict(handles)
    if note:
        shown[note] = Line2D([], [], linestyle="none")
    if shown:
        figure.legend(list(shown.values()), list(shown), loc="outside lower left", ncols=columns)


def front(entries: Sequence[Mapping[str, Any]], look: Theme) -> "Figure":
    """Plot a tuning run's reward and judge against diversity and distance, a line per step count.

    Args:
        entries: entries with "scale", "steps", "alarms", "reward", "kid" and, if available,
            "judge" and "diversity".
        look: the colours.
    """
    from matplotlib.figure import Figure

    ys = {"reward": "reward", "judge": "held-out judge's score"}
    xs = {"diversity": "diversity (feature distance)", "kid": "distance to the base (KID)"}
    rows, columns = [y for y in ys if y in entries[0]], [x for x in xs if x in entries[0]]
    size = 4.2 * len(columns) + 0.2, 3.2 * len(rows) + 0.6
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(rows), len(columns), squeeze=False, sharex="col", sharey="row")
    handles: dict[str, Any] = {}
    ring: dict[str, Any] = {}
    for row, y in zip(axes, rows, strict=True):
        for axis, x in zip(row, columns, strict=True):
            for i, k in enumerate(dict.fromkeys(e["steps"] for e in entries)):
                line = sorted((e for e in entries if e["steps"] == k), key=lambda e: e["scale"])
                (drawn,) = axis.plot(
                    [e[x] for e in line], [e[y] for e in line], color=look.colour(i),
                    marker=MARKERS[i % len(MARKERS)], ms=4,
                )  # fmt: skip
                handles[f"{k} step{'s' * (k > 1)}"] = drawn
                alarmed = [e for e in line if e["alarms"]]
                if alarmed:
                    ring["an alarm was raised"] = axis.plot(
                        [e[x] for e in alarmed], [e[y] for e in alarmed], ls="none", marker="o",
                        ms=10, mfc="none", mec=look.ink, mew=0.9,
                    )[0]  # fmt: skip
                for e in line if i == 0 else []:
                    axis.annotate(f"{e['scale']:g}", (e[x], e[y]), (5, 3), fontsize=7,
                                  textcoords="offset points", color=look.colour(0))  # fmt: skip
        row[0].set_ylabel(ys[y])
    for axis, x in zip(axes[-1], columns, strict=True):
        axis.set_xlabel(xs[x])
    below(figure, handles | ring, columns=3, note="numbers: scale of the adapters")
    return figure


def tuned_fronts(
    sections: Mapping[str, Mapping[str, Mapping[str, Sequence[Point]]]], look: Theme
) -> "Figure":
    """Plot reward and judge against diversity: a column per number of steps, a line per adapter.

    Args:
        sections: title -> score -> "base", "adapters" and "methods" -> points. An adapter's
            points have a setting "scale"; its line begins at the base.
        look: the colours.
    """
    from matplotlib.figure import Figure

    titles, scores = list(sections), list(next(iter(sections.values())))
    size = 3.7 * len(titles) + 0.6, 3.1 * len(scores) + 1.2
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(scores), len(titles), squeeze=False, sharey="row")
    of = {"adapters": {}, "methods": {}}  # type: dict[str, dict[str, int]]
    for by_score in sections.values():
        for parts in by_score.values():
            for kind, places in of.items():
                for p in parts[kind]:
                    places.setdefault(p.method, len(places))
    handles: dict[str, Any] = {}
    for i, (row, score) in enumerate(zip(axes, scores, strict=True)):
        for axis, title in zip(row, titles, strict=True):
            if i == 0:
                axis.set_title(title)
            if i == len(scores) - 1:
                axis.set_xlabel("diversity (feature distance)")
            parts = sections[title][score]
            bars = partial(_bars, axis, handles)
            bars("base", parts["base"], color=look.ink, marker="*", ms=10, ls="none", zorder=4)
            for name, k in of["adapters"].items():
                mine = [p for p in parts["adapters"] if p.method == name]
                style = {"color": look.colour(k), "marker": MARKERS[k % len(MARKERS)], "ms": 4}
                bars(name, [*parts["base"], *mine], **style)
                for p in (p for p in mine if p.known):
                    axis.annotate(f"{p.settings['scale']:g}", (p.x.mean, p.y.mean), (4, 3),
                                  textcoords="offset points", fontsize=6,
                                  color=look.colour(k))  # fmt: skip
            for name, k in of["methods"].items():
                mine = [p for p in parts["methods"] if p.method == name]
                bars(name, mine, color=look.faint, marker="sD^vP*X<>"[k % 9], ms=5, ls="none")
        row[0].set_ylabel({"judge": "held-out judge's score"}.get(score, score))
    below(figure, handles, columns=max(1, len(titles)),
          note=f"numbers: scale of the adapters; {ERRORS}")  # fmt: skip
    return figure


def _bars(axis: Any, handles: dict[str, Any], name: str, points: Sequence[Point],
          **style: Any) -> None:  # fmt: skip
    known = [p for p in points if p.known]
    if known:
        handles[name] = axis.errorbar(
            [p.x.mean for p in known], [p.y.mean for p in known],
            xerr=[p.x.error or 0 for p in known], yerr=[p.y.error or 0 for p in known],
            elinewidth=0.6, **style,
        )  # fmt: skip


def curves(
    panels: Sequence[tuple[str, str, Sequence[float], Mapping[str, Sequence[float]]]],
    families: Mapping[str, str],
    look: Theme,
    dashed: Mapping[str, Sequence[float]] | None = None,
) -> "Figure":
    """Plot lines with logarithmic y, coloured by family; x of the first panel is logarithmic, too.

    Args:
        panels: label of x, label of y, the x values, and name -> y values.
        families: name -> its family, "" for none; each has one colour, and the legend is by
            family.
        look: the colours.
        dashed: further, dashed lines of the last panel.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import NullLocator

    figure = Figure(figsize=(9.2, 5.6), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    kinds = sorted({f for f in families.values() if f})
    colours = {kind: look.colour(i) for i, kind in enumerate(kinds)} | {"": look.faint}
    handles: dict[str, list[tuple[str, Any]]] = {}
    for i, (axis, (x_label, y_label, xs, lines)) in enumerate(zip(axes, panels, strict=True)):
        count: dict[str, int] = {}
        for name, values in lines.items():
            kind = families.get(name, "")
            place = count[kind] = count.get(kind, -1) + 1
            (drawn,) = axis.plot(
                xs,
                values,
                color=colours[kind],
                marker=(MARKERS + "<>")[place % 10],
                lw=1,
                ls=("-", "--", "-.")[place // 10 % 3],
            )
            if i == 0:
                handles.setdefault(kind, []).append((name, drawn))
        axis.set(xlabel=x_label, ylabel=y_label, yscale="log")
        if i == 0:
            axis.set_xscale("log")
            axis.set_xticks(xs, [f"{x:g}" for x in xs])
            axis.xaxis.set_minor_locator(NullLocator())
    for name, values in (dashed or {}).items():
        axes[-1].plot(panels[-1][2], values, color=look.ink, ls="--", label=name)
        axes[-1].legend()
    blank = Line2D([], [], linestyle="none")
    columns = [[(kind or "other", blank), *handles[kind]] for kind in [*kinds, ""]
               if kind in handles]  # fmt: skip
    rows = list(zip_longest(*columns, fillvalue=("", blank)))
    entries = [cell for column in zip(*rows, strict=True) for cell in column]
    figure.legend([h for _, h in entries], [n for n, _ in entries],
                  loc="outside lower left", ncols=len(columns))  # fmt: skip
    return figure
