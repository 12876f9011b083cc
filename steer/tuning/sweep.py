"""`steer.finetune`: tune the adapters of a flow map by a reward, in one call.

The recipe of a run: probe the temperature, put adapters on, run Lightning's loop with the
instruments on, and at the end draw the front of reward against drift by a sweep of the adapters'
scale. A run that stopped goes on from its last checkpoint when it is called again.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from steer.tuning.panel import Panel

__all__ = ["front_figures", "recommended", "sweep"]


def sweep(
    panel: "Panel", scales: Sequence[float], steps: Sequence[int], out: Path
) -> list[dict[str, Any]]:
    """Read the instruments at each scale of the adapters and number of jumps: the front.

    Writes front.json, and front.png: the reward against diversity and drift.

    Args:
        panel: what is drawn and read.
        scales: of the adapters; 0 is the base.
        steps: composed jumps.
        out: the folder.
    """
    from steer.files import write_atomically
    from steer.tuning.front import plot_front

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


def front_figures(front: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return base and tuned figures at the fewest steps, for the card."""
    from steer.tuning.callbacks import figures

    fewest = min(entry["steps"] for entry in front)
    best = recommended(front)
    return figures(next(e for e in front if e["steps"] == fewest and e["scale"] == best))
