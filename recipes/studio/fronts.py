"""The front of a tuning run: pictures with the same seeds at each scale, and the readings."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

import steer
from recipes.studio.jobs import NO_PICTURES
from recipes.studio.places import inside_quietly
from steer.adapters.store import WEIGHTS, load_adapters
from steer.flow import FlowMap
from steer.pictures import to_pil
from steer.reward import Reward
from steer.tuning.front import SCALES
from steer.tuning.panel import Panel

__all__ = ["SCALES", "AtScale", "adapters_of", "known_front", "scales_of"]

CHECKED = 8
"""Number of prompts that are read if the run has no front."""

SAMPLES, PICTURES, STEPS = 4, 4, 4
"""Pictures per prompt; pictures that are shown; and their number of jumps."""


class AtScale(NamedTuple):
    """One scale of the adapters.

    Attributes:
        scale: 0 is the base.
        images: pictures with the same seeds at every scale.
        rewards: reward of each picture.
        entry: the reading, as in front.json: reward, kid, alarms, and judge and diversity if
            available.
    """

    scale: float
    images: list[Image.Image]
    rewards: list[float]
    entry: dict[str, Any]


def adapters_of(root: Path, folder: Path) -> Path:
    """Return the folder of a run's adapters: its own, or `best` in it if it was stopped early.

    Raises:
        ValueError: there are no adapters yet.
    """
    for place in (folder, folder / "best"):
        if (place / WEIGHTS).is_file() and inside_quietly(root, place / WEIGHTS):
            return place
    raise ValueError(
        f"{folder.name!r} holds no adapters yet: start the run, and wait for its first check"
    )


def known_front(root: Path, folder: Path) -> list[dict[str, Any]]:
    """Return the readings of a finished run at its fewest jumps; [] if it has none."""
    file = folder / "front.json"
    if not (file.is_file() and inside_quietly(root, file)):
        return []
    entries = json.loads(file.read_text(encoding="utf-8"))
    fewest = min((e["steps"] for e in entries), default=0)
    return sorted((e for e in entries if e["steps"] == fewest), key=lambda e: e["scale"])


def scales_of(
    flow: FlowMap, judge: Reward | None, reward: Reward, root: Path, folder: Path, prompt: str
) -> Iterator[AtScale]:
    """Sample the same seeds at each scale, and read the instruments if the run itself has not.

    If the run has a front.json, its readings are used. Otherwise the instruments of
    `steer finetune` read one-jump pictures of the run's own check prompts.

    Args:
        flow: the base.
        judge: its held-out reward, if it has one.
        reward: reward for the captions and the readings.
        root: the folder outside of which nothing is read.
        folder: folder of the run, finished or stopped.
        prompt: prompt of the shown pictures.

    Raises:
        ValueError: there is no run with adapters in it, or its adapters are for another model.
    """
    tuned = load_adapters(flow, adapters_of(root, folder))
    known = {e["scale"]: e for e in known_front(root, folder)}
    scales = sorted(known) or list(SCALES)
    panel = None
    if not known:
        panel = Panel(tuned, _checked(root, folder), SAMPLES, reward, judge=judge)
    for scale in scales:
        if panel is None:
            entry = known[scale]
        else:
            with torch.no_grad():
                reading, alarms, _ = panel.read(scale)
            names = [alarm.name for alarm in alarms]
            entry = {"scale": scale, "steps": 1, "alarms": names} | reading.as_dict()
        made = steer.sample(
            tuned.at(scale), reward, [prompt], PICTURES, STEPS, "none", seed=0, progress=False
        )
        if made.images is None:
            raise ValueError(NO_PICTURES)
        images = [to_pil(image) for image in made.images.flatten(0, 1)]
        yield AtScale(scale, images, made.rewards.flatten().tolist(), entry)


def _checked(root: Path, folder: Path) -> Sequence[str] | None:
    """Return the first check prompts of a run; None for a model without prompts."""
    file = folder / "run.json"
    if not (file.is_file() and inside_quietly(root, file)):
        raise ValueError(f"{folder.name!r} has no run.json: it is no run of `steer finetune`")
    begun = json.loads(file.read_text(encoding="utf-8"))
    prompts = begun.get("settings", {}).get("check_prompts") or begun.get("prompts")
    return prompts and prompts[:CHECKED]
