"""Restore a run folder's settings for the Steer page. It loads no network."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from recipes.studio.ask import Ask
from recipes.studio.places import inside_quietly

__all__ = ["Restored", "restored", "shown_of"]

OTHERS = "Steer makes different pictures"

DEFAULTS = {"particles": 4, "steps": 16, "seed": 0}
"""Defaults of `steer sample` for settings that are not in the config."""

ELSEWHERE = {
    "out", "overwrite", "unguided", "keep", "film", "batch_size", "devices", "num_nodes", "spread",
}  # fmt: skip
"""Settings that do not change the pictures."""

WITHOUT = {
    "lora", "lora_scale", "reward_prompt", "cfg", "negative_prompt", "init_image", "init_time",
    "dtype", "model_options", "compile", "device",
}  # fmt: skip
"""Settings that change the pictures and have no field on the page."""

PLAIN = {"init_by": "noise", "on_bad_reward": "stop", "model_options": {}, "compile": False}
"""Settings that change nothing if they have these values."""


class Restored(NamedTuple):
    """The restored settings of a run folder.

    Attributes:
        ask: settings for the page's fields.
        lost: settings of the run without a field on the page, so that its pictures will differ.
        touched: whether particles were kept by hand, or the run was stopped.
    """

    ask: Ask
    lost: dict[str, Any]
    touched: bool

    @property
    def note(self) -> str:
        """A text on whether Steer will reproduce the run's pictures."""
        if self.lost:
            named = ", ".join(f"{name}: {value}" for name, value in self.lost.items())
            return f"this run also set {named}, which has no field here: {OTHERS}"
        if self.touched:
            return f"particles were kept or the run was stopped by hand: {OTHERS}"
        return "Steer makes these pictures again"


def restored(root: Path, folder: Path, model: str, device: str | None = None) -> Restored:
    """Read the config.yaml of a run that `steer sample` or the studio wrote.

    Args:
        root: the folder outside of which nothing is read.
        folder: folder of the run.
        model: the page's model.
        device: the page's device.

    Raises:
        ValueError: the file cannot be read, or the run was made with another model.
    """
    text = _text(root, folder / "config.yaml")
    try:
        read = yaml.safe_load(text)
    except yaml.YAMLError:
        read = None
    if not isinstance(read, dict) or "reward" not in read or "method" not in read:
        raise ValueError(
            f"{folder.name}/config.yaml is not of `steer sample`: open a folder that it or the "
            "Steer page has written"
        )
    if read.get("model", "emoji") != model:
        raise ValueError(
            f"{folder.name} was made with the model {read.get('model')!r}, and this page has "
            f"{model!r}: start `steer studio --model {read.get('model')}`"
        )
    usual = {**PLAIN, "device": device}
    found = {k: v for k, v in read.items() if k not in ELSEWHERE and usual.get(k, ...) != v}
    if device is not None and "device" not in read:
        found["device"] = None
    lost = {k: found.pop(k) for k in sorted(WITHOUT & found.keys())}
    own = found.pop("options", {})
    found.pop("model", None)
    file = found.pop("prompts_file", None)
    prompt = found.pop("prompt", None)
    if prompt is None and file is not None:
        prompt, asked = _scored(root, folder)
        if asked != prompt:
            lost["reward_prompt"] = asked
    lines = [prompt] if isinstance(prompt, str) else prompt
    named = {k: found.pop(k, default) for k, default in DEFAULTS.items()}
    reward, method = str(found.pop("reward")), str(found.pop("method"))
    try:
        if not lines or not all(isinstance(line, str) for line in lines):
            raise ValueError
        options = {**{k: v for k, v in found.items() if v is not None}, **own}
        ask = Ask(tuple(lines), reward, method, options=options,
                  **{k: int(v) for k, v in named.items()})  # fmt: skip
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{folder.name}/config.yaml holds a prompt or a number that cannot be read"
        ) from error
    return Restored(ask, lost, text.startswith("# particles were kept"))


def _scored(root: Path, folder: Path) -> tuple[list[str], list[str]]:
    """Return the prompts of a run, and its reward's prompts, from its scores.jsonl."""
    lines = _text(root, folder / "scores.jsonl").splitlines()
    try:
        first = [row for row in map(json.loads, lines) if row.get("particle") == 0]
        return [row["prompt"] for row in first], [row["reward_prompt"] for row in first]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{folder.name}/scores.jsonl is damaged, and the prompts of this run are in it alone"
        ) from error


def _text(root: Path, file: Path) -> str:
    if not (file.is_file() and inside_quietly(root, file)):
        raise ValueError(f"{file.parent.name} has no {file.name}: it is no run of `steer sample`")
    return file.read_text(encoding="utf-8")


def shown_of(root: Path, folder: Path) -> list[tuple[Path, str]]:
    """Return the pictures of a run folder that scores.jsonl lists, with their rewards."""
    try:
        rows = [json.loads(line) for line in _text(root, folder / "scores.jsonl").splitlines()]
        named = [(folder / row["image"], f"{row['reward']:.4g}") for row in rows if row["image"]]
    except (ValueError, KeyError, TypeError, AttributeError):
        return []
    return [(f, caption) for f, caption in named if f.is_file() and inside_quietly(root, f)]
