"""The front of a tuning run: reward against diversity and drift, by scale of the adapters."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from steer.doors import plot_front
from steer.files import write_atomically
from steer.tuning.panel import Panel
from steer.tuning.settings import Settings

__all__ = ["figures", "front_figures", "plan_sweep", "recommended", "sweep"]

SCALES = (0.0, 0.25, 0.5, 0.75, 1.0)
STEPS = (1, 2, 4, 8)

SHARE = 0.1
"""Maximum cost of a sweep that was not requested, as a share of the run's own network calls."""


def plan_sweep(panel: Panel, settings: Settings, nfe: float) -> tuple[list[float], list[int], str]:
    """Return the scales and the numbers of jumps to evaluate, and a line on what was left out.

    If the settings give them, all are evaluated. Otherwise as many of `STEPS`, fewest first, as
    cost at most `SHARE` of the run.

    Args:
        panel: what is sampled and measured.
        settings: settings, which may have scales and steps.
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
        f"be more than a tenth of the run's {nfe:.0f}; set more with sweep_steps={steps}"
    )
    return scales, bought, left


def sweep(
    panel: Panel, scales: Sequence[float], steps: Sequence[int], out: Path | None = None
) -> list[dict[str, Any]]:
    """Read the instruments at each scale of the adapters and number of jumps: the front.

    Writes front.json, and front.png: the reward against diversity and drift.

    Args:
        panel: what is sampled and measured.
        scales: scales of the adapters; 0 is the base.
        steps: numbers of composed jumps.
        out: the folder; None: nothing is written.
    """
    front = []
    for k in steps:
        for scale in scales:
            reading, alarms, _ = panel.read(scale, k, drift=k == min(steps))
            entry = {"scale": scale, "steps": k, "alarms": [a.name for a in alarms]}
            front.append(entry | reading.as_dict())
    if out is not None:
        write_atomically(out / "front.json", json.dumps(front, indent=1).encode())
        plot_front(front, out / "front.png")
    return front


def recommended(front: Sequence[Mapping[str, Any]]) -> float:
    """Return the scale without an alarm and with the highest judge score, at the fewest steps.

    Without a judge it is the largest scale without an alarm.
    """
    fewest = min(entry["steps"] for entry in front)
    quiet = [e for e in front if e["steps"] == fewest and not e["alarms"]]
    if not quiet:  # the base, or the scale nearest to it
        return min(entry["scale"] for entry in front)
    return max(quiet, key=lambda e: e.get("judge", e["scale"]))["scale"]


def figures(entry: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return the figures of a reading for a model card: name -> base and tuned."""
    names = [k.removesuffix("/base") for k in entry if k.endswith("/base")]
    return {n: {"base": entry[f"{n}/base"], "tuned": entry[n]} for n in names}


def front_figures(front: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return base and tuned figures at the recommended scale and the fewest steps."""
    fewest = min(entry["steps"] for entry in front)
    best = recommended(front)
    return figures(next(e for e in front if e["steps"] == fewest and e["scale"] == best))
