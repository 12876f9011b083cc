"""The front of a tuning run: what reward costs in diversity and drift, by the adapters' scale."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from steer.files import write_atomically
from steer.tuning.panel import Panel
from steer.tuning.settings import Settings

__all__ = ["figures", "front_figures", "plan_sweep", "plot_front", "recommended", "sweep"]

SCALES = (0.0, 0.25, 0.5, 0.75, 1.0)
STEPS = (1, 2, 4, 8)

SHARE = 0.1
"""What a sweep that nobody asked for may cost, as a share of the run's own network calls."""


def plan_sweep(panel: Panel, settings: Settings, nfe: float) -> tuple[list[float], list[int], str]:
    """Return the scales and the numbers of jumps to read, and a line on what was left out.

    What the settings ask for is read in full; else as many of `STEPS`, fewest first, as cost at
    most `SHARE` of the run.

    Args:
        panel: what is drawn.
        settings: they may say scales and steps.
        nfe: network forward-equivalents of the run.
    """
    scales = list(SCALES if settings.sweep is None else settings.sweep)
    steps = list(STEPS if settings.sweep_steps is None else settings.sweep_steps)
    if settings.sweep is not None or settings.sweep_steps is not None:
        return scales, steps if scales else [], ""
    costs = [panel.cost(scales, steps[: i + 1]) for i in range(len(steps))]
    bought = [k for k, cost in zip(steps, costs, strict=True) if cost <= SHARE * nfe]
    if len(bought) == len(steps):
        return scales, steps, ""
    jumps = " and ".join(map(str, bought)) if bought else "no"
    left = (
        f"the adapters' scale is swept at {jumps} jumps: {costs[len(bought)]} network calls would "
        f"be more than a tenth of the run's {nfe:.0f}; ask for more with sweep_steps={steps}"
    )
    return scales, bought, left


def sweep(
    panel: Panel, scales: Sequence[float], steps: Sequence[int], out: Path
) -> list[dict[str, Any]]:
    """Read the instruments at each scale of the adapters and number of jumps: the front.

    Writes front.json, and front.png: the reward against diversity and drift.

    Args:
        panel: what is drawn and read.
        scales: of the adapters; 0 is the base.
        steps: composed jumps.
        out: the folder.
    """
    front = []
    for k in steps:
        for scale in scales:
            reading, alarms, _ = panel.read(scale, k, drift=k == min(steps))
            entry = {"scale": scale, "steps": k, "alarms": [a.name for a in alarms]}
            front.append(entry | reading.as_dict())
    write_atomically(out / "front.json", json.dumps(front, indent=1).encode())
    plot_front(front, out / "front.png")
    return front


def recommended(front: Sequence[Mapping[str, Any]]) -> float:
    """Return the scale that the judge likes best in the fewest steps among those without alarm.

    Without a judge: the largest without alarm.
    """
    fewest = min(entry["steps"] for entry in front)
    quiet = [e for e in front if e["steps"] == fewest and not e["alarms"]]
    if not quiet:  # the base, or the nearest to it
        return min(entry["scale"] for entry in front)
    return max(quiet, key=lambda e: e.get("judge", e["scale"]))["scale"]


def figures(entry: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return what a model card tells of a reading: name -> base and tuned."""
    names = [k.removesuffix("/base") for k in entry if k.endswith("/base")]
    return {n: {"base": entry[f"{n}/base"], "tuned": entry[n]} for n in names}


def front_figures(front: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return base and tuned figures at the recommended scale and the fewest steps."""
    fewest = min(entry["steps"] for entry in front)
    best = recommended(front)
    return figures(next(e for e in front if e["steps"] == fewest and e["scale"] == best))


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
