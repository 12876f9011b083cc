"""A `steer finetune` run as the Tune page sees it: its process, its readings and its curves."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

__all__ = ["Tunings", "curves", "front_of", "readings"]

COLOURS = {"reward": "#0072b2", "judge": "#e69f00", "diversity": "#009e73"}
ALARM = "#d55e00"
GREY = "#8a8a8a"  # readable on light and on dark


class Tunings:
    """The tuning runs that this studio has started, by folder."""

    def __init__(self) -> None:
        self._of: dict[Path, subprocess.Popen[bytes]] = {}

    def running(self, folder: Path) -> bool:
        """Tell whether a run of this folder is at work."""
        one = self._of.get(folder)
        return one is not None and one.poll() is None

    def start(self, folder: Path, options: dict[str, Any]) -> None:
        """Start `steer finetune`, or resume it: the same command goes on where it stopped.

        Raises:
            ValueError: a run of this folder is at work, or any other.
        """
        if any(self.running(other) for other in self._of):
            raise ValueError("a tuning run is at work already: stop it first, or wait")
        words = [str(w) for name, value in options.items() for w in (f"--{name}", value)]
        folder.parent.mkdir(parents=True, exist_ok=True)
        with self.log(folder).open("wb") as log:
            self._of[folder] = subprocess.Popen(
                [sys.executable, "-m", "recipes.cli", "finetune", *words, "--out", str(folder)],
                stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                env=os.environ | {"COLUMNS": "100"},
            )  # fmt: skip

    def stop(self, folder: Path) -> None:
        """Ask a run to stop; what it has reached is kept.

        Raises:
            ValueError: no run of this folder is at work.
        """
        if not self.running(folder):
            raise ValueError(f"no tuning run is at work in {folder.name!r}")
        self._of[folder].send_signal(signal.SIGINT)

    def error(self, folder: Path) -> str:
        """Return the error with which the run of this folder ended, empty where it had none."""
        one = self._of.get(folder)
        if one is None or one.poll() in {None, 0, 130}:
            return ""
        lines = self.log(folder).read_text(errors="replace").strip().splitlines()
        return lines[-1].removeprefix("error: ") if lines else f"ended with code {one.poll()}"

    def close(self) -> None:
        """Stop what runs, as the studio ends."""
        for folder in list(self._of):
            if self.running(folder):
                self.stop(folder)

    @staticmethod
    def log(folder: Path) -> Path:
        """Return the file beside a run folder that has what its process printed."""
        return folder.with_name(f".{folder.name}.log")


def readings(folder: Path) -> list[dict[str, Any]]:
    """Return the checks of a run so far, step by step."""
    file = folder / "readings.jsonl"
    if not file.is_file():
        return []
    return [json.loads(line) for line in file.read_text().splitlines() if line.strip()]


def curves(checks: list[dict[str, Any]]) -> Any:
    """Return a figure of the readings, with a band where an alarm was raised."""
    figure, axes = _axes("optimizer step", "mean over the check's pictures")
    steps = [check["step"] for check in checks]
    for name, colour in COLOURS.items():
        values = [check.get(name) for check in checks]
        if all(isinstance(v, int | float) for v in values) and values:
            axes.plot(steps, values, marker="o", label=name, color=colour)
    before = 0
    for check in checks:
        if check.get("alarms"):
            axes.axvspan(before, check["step"], color=ALARM, alpha=0.2, lw=0)
        before = check["step"]
    if axes.lines:
        axes.legend(frameon=False, labelcolor=GREY)
    return figure


def front_of(entries: list[dict[str, Any]], chosen: float) -> Any:
    """Return a figure of reward and judge against the distance to the base, scale by scale.

    Args:
        entries: lines of a front.json of one number of jumps.
        chosen: the scale that is marked.
    """
    figure, axes = _axes("distance to the model without adapters (KID)", "mean")
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


def _axes(x: str, y: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.2), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    axes.set(xlabel=x, ylabel=y)
    axes.tick_params(colors=GREY)
    axes.xaxis.label.set_color(GREY)
    axes.yaxis.label.set_color(GREY)
    for spine in axes.spines.values():
        spine.set_color(GREY)
    return figure, axes
