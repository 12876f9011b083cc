"""The front of a tuning run: the same seeds at each scale of its adapters, and what was read."""

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
"""Prompts of the run that are read where it has no front of its own."""

SAMPLES, PICTURES, STEPS = 4, 4, 4
"""Pictures of each of these; those that are shown, and the jumps that make them."""


class AtScale(NamedTuple):
    """One scale of the adapters.

    Attributes:
        scale: 0 is the base.
        images: of the same seeds at every scale.
        rewards: of each.
        entry: what was read, as a line of front.json: reward, kid, alarms, and judge and
            diversity where there are some.
    """

    scale: float
    images: list[Image.Image]
    rewards: list[float]
    entry: dict[str, Any]


def adapters_of(root: Path, folder: Path) -> Path:
    """Return where a run's adapters are: its folder, or `best` in it where it was stopped early.

    Raises:
        ValueError: there are none yet.
    """
    for place in (folder, folder / "best"):
        if (place / WEIGHTS).is_file() and inside_quietly(root, place / WEIGHTS):
            return place
    raise ValueError(
        f"{folder.name!r} holds no adapters yet: start the run, and wait for its first check"
    )


def known_front(root: Path, folder: Path) -> list[dict[str, Any]]:
    """Return what a finished run read by itself, at its fewest jumps; [] where it did not."""
    file = folder / "front.json"
    if not (file.is_file() and inside_quietly(root, file)):
        return []
    entries = json.loads(file.read_text(encoding="utf-8"))
    fewest = min((e["steps"] for e in entries), default=0)
    return sorted((e for e in entries if e["steps"] == fewest), key=lambda e: e["scale"])


def scales_of(
    flow: FlowMap, judge: Reward | None, reward: Reward, root: Path, folder: Path, prompt: str
) -> Iterator[AtScale]:
    """Draw the same seeds at each scale, and read what the run itself has not.

    Where the run has a front.json, its readings are taken. Else the instruments of
    `steer finetune` read one-jump pictures of the run's own check prompts.

    Args:
        flow: the base.
        judge: its held-out reward, if it has one.
        reward: of the captions, and of the readings.
        root: nothing outside of it is read.
        folder: the run's, finished or stopped.
        prompt: of the pictures that are shown.

    Raises:
        ValueError: there is no run in it that has something to show, or its adapters are of
            another model.
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
    """Return the first prompts that a run is checked on; None for a model without prompts."""
    file = folder / "run.json"
    if not (file.is_file() and inside_quietly(root, file)):
        raise ValueError(f"{folder.name!r} has no run.json: it is no run of `steer finetune`")
    begun = json.loads(file.read_text(encoding="utf-8"))
    prompts = begun.get("settings", {}).get("check_prompts") or begun.get("prompts")
    return prompts and prompts[:CHECKED]
