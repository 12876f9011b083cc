"""The look of every plot: colours, light and dark, PNG and SVG."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["FORMATS", "MARKERS", "Format", "Theme", "ThemeName", "logarithmic", "save", "theme"]

Format = Literal["png", "svg"]
ThemeName = Literal["light", "dark"]
FORMATS: tuple[Format, ...] = ("png", "svg")
MARKERS = "osD^vP*X"
"""Markers, one per group, so that a plot is readable without colours."""

_DPI = 144
_ONE_AT_A_TIME = threading.Lock()  # matplotlib's settings are global


@dataclass(frozen=True)
class Theme:
    """Colours of one background.

    The palette is that of Okabe and Ito (2008), which people with each kind of colour blindness
    can tell apart, without its yellow on white and its dark blue on black.

    Attributes:
        name: light or dark.
        colours: one per group, in order.
        paper: the background.
        ink: text and axes.
        faint: grid lines and less important elements.
    """

    name: str
    colours: tuple[str, ...]
    paper: str
    ink: str
    faint: str

    def colour(self, i: int) -> str:
        """Return the colour of the i-th group; the colours repeat."""
        return self.colours[i % len(self.colours)]


_THEMES = {
    "light": Theme(
        "light",
        ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A5195"),
        "#ffffff", "#1a1a1a", "#8a8a8a",
    ),
    "dark": Theme(
        "dark",
        ("#56B4E9", "#FF8A4C", "#2BC79A", "#E6A1C8", "#F0C04A", "#9BD3F5", "#B79AD1"),
        "#15171c", "#e8e8e8", "#8f949e",
    ),
}  # fmt: skip


def theme(name: str) -> Theme:
    """Return a theme by its name.

    Raises:
        ValueError: it is neither light nor dark.
    """
    if name not in _THEMES:
        raise ValueError(f"no theme {name!r}: use one of {', '.join(_THEMES)}")
    return _THEMES[name]


@contextmanager
def _settings(look: Theme) -> Iterator[None]:
    import matplotlib

    own = {
        "figure.facecolor": look.paper, "savefig.facecolor": look.paper,
        "axes.facecolor": look.paper, "axes.edgecolor": look.faint, "axes.labelcolor": look.ink,
        "axes.titlecolor": look.ink, "axes.titlesize": 10, "axes.titleweight": "bold",
        "axes.titlelocation": "left", "axes.labelsize": 9, "axes.spines.top": False,
        "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
        "grid.color": look.faint, "grid.alpha": 0.25, "grid.linewidth": 0.6,
        "xtick.color": look.faint, "ytick.color": look.faint, "xtick.labelcolor": look.ink,
        "ytick.labelcolor": look.ink, "xtick.labelsize": 8, "ytick.labelsize": 8,
        "text.color": look.ink, "legend.fontsize": 8, "legend.frameon": False,
        "legend.labelcolor": look.ink, "font.family": ["DejaVu Sans"], "font.size": 9,
        "lines.linewidth": 1.4, "lines.markersize": 5.5, "svg.hashsalt": "flowsteer",
        "axes.formatter.use_mathtext": True,
    }  # fmt: skip
    with _ONE_AT_A_TIME, matplotlib.rc_context(own):
        yield


def save(
    draw: "Callable[[Theme], Figure]",
    out: Path,
    look: str = "light",
    formats: Sequence[str] = FORMATS,
) -> list[Path]:
    """Draw a figure and write it, each file atomically.

    Args:
        draw: makes the figure with a theme's colours.
        out: the file; its ending is replaced by each format's.
        look: "light" or "dark".
        formats: "png", "svg" or both.

    Returns:
        The files.

    Raises:
        ValueError: a theme or a format that does not exist.
    """
    chosen = theme(look)
    if unknown := [f for f in formats if f not in FORMATS]:
        raise ValueError(f"plots are written as {' or '.join(FORMATS)}, not as {unknown[0]!r}")
    made = []
    with _settings(chosen):
        figure = draw(chosen)
        for kind in formats:
            file = out.with_suffix(f".{kind}")
            partial = file.with_name(f".{file.name}")
            about = {"Date": None} if kind == "svg" else {"Software": None}  # reproducible
            figure.savefig(partial, dpi=_DPI, format=kind, metadata=about)
            partial.replace(file)
            made.append(file)
    return made


def logarithmic(axis: "Axes", values: Sequence[float]) -> None:
    """Make x logarithmic, with plain numbers at as many ticks as there is room for."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    wide = bool(values) and max(values) > 300 * min(values)
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 2, 5)))
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
