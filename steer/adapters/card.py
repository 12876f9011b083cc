"""The model card of a folder of adapters: what they are, how they were made, how to use them.

The card is the folder's `README.md`, Markdown under the YAML front matter that model hubs read.
It contains only what the metadata of the adapters' file say (`read_metadata`).
"""

import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from steer.adapters.card_use import how_to_use, line, number
from steer.adapters.store import read_config, read_metadata
from steer.files import write_atomically

__all__ = ["FORMS", "PICTURES", "card", "known_notes", "write_card"]

PICTURES = {
    "grid.png": "base and tuned, same seeds",
    "samples.png": "base and tuned, same seeds",
    "front.png": "reward against diversity and drift, by the scale of the adapters",
}
"""Pictures that a card shows if they are in its folder -> their captions."""

FORMS = {
    "peft": "LoRA adapters for `steer.load` and peft",
    "diffusers": "LoRA adapters for diffusers' `load_lora_weights`",
    "comfyui": "LoRA adapters for ComfyUI",
    "merged": "a whole model with the adapters added to its weights",
}
"""Format of a folder -> its line in a card."""

LIBRARIES = {"peft": "peft", "diffusers": "diffusers", "comfyui": "diffusers"}
"""Format of a folder -> the library for a hub; else our own."""

EXAMPLES = 8
"""Prompts that a card shows."""

_KINDS: dict[str, tuple[type, ...]] = (
    dict.fromkeys(("options", "settings", "versions", "figures"), (Mapping,))
    | dict.fromkeys(("scale", "baked_scale", "prompt_count"), (int, float))
    | {"prompts": (list,), "base": (str,)}
)
"""The types of metadata whose parts a card or an export uses."""


def known_notes(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metadata of a file, without values of an unexpected type.

    >>> known_notes({"reward": "clip", "scale": "large", "prompts": "a fox"})
    {'reward': 'clip'}
    """
    return {
        name: value
        for name, value in metadata.items()
        if isinstance(value, _KINDS.get(name, (object,)))
        and not (isinstance(value, float) and not math.isfinite(value))
    }


def card(
    metadata: Mapping[str, Any],
    where: str = "path/to/this/folder",
    *,
    repository: str | None = None,
    form: str = "peft",
    pictures: Sequence[str] = (),
    rank: int | None = None,
    alpha: float | None = None,
) -> str:
    """Return a model card, Markdown with YAML front matter.

    Args:
        metadata: metadata of the adapters' file: base, base_sha256, reward, objective, options,
            prompts, prompt_count, temperature, steps, batch, seed, scale (recommended), figures
            ({name: {"base": x, "tuned": y}}), settings, versions, licence, and baked_scale (the
            fraction of the original update that is scale 1 now). Missing entries are left out.
        where: the folder, as written in the code that loads it.
        repository: its repository on a model hub, user/name.
        form: a key of `FORMS`.
        pictures: names of pictures in the same folder.
        rank: rank of the adapters.
        alpha: their update is scaled by alpha / rank.
    """
    metadata = known_notes(metadata)
    base = str(metadata.get("base") or "")
    reward = metadata.get("reward")
    title = f"{base or 'a flow map'}, tuned by {reward}" if reward else f"{base}, tuned"
    parts = [_front(base, form, metadata), f"# {line(title)}", _summary(base, form, metadata)]
    shown = [f"![{PICTURES.get(name, name)}]({name})" for name in pictures]
    parts += ["\n".join(shown)] if shown else []
    parts += ["## Use", how_to_use(where, repository, form, metadata)]
    if metadata.get("figures"):
        parts += ["## Figures", _figures(metadata["figures"])]
    parts += ["## How it was made", _made(metadata, rank, alpha)]
    parts += ["## Licence and limits", _limits(base, metadata)]
    return "\n\n".join(parts) + "\n"


def write_card(folder: str | os.PathLike[str], where: str | None = None) -> Path:
    """Write the card of a folder of adapters, `README.md`, from the metadata of their file.

    Args:
        folder: a folder that `save_adapters` wrote; pictures in it are shown.
        where: the folder, as written in the code that loads it. Default: its name.

    Returns:
        The card's file.

    Raises:
        FileNotFoundError: the folder lacks one of the adapters' two files.
        ValueError: one of them is truncated.
    """
    folder = Path(folder)
    config = read_config(folder)
    text = card(
        read_metadata(folder),
        where or folder.resolve().name,
        pictures=[name for name in PICTURES if (folder / name).is_file()],
        rank=config.get("r"),
        alpha=config.get("lora_alpha"),
    )
    write_atomically(folder / "README.md", text.encode())
    return folder / "README.md"


def _front(base: str, form: str, metadata: Mapping[str, Any]) -> str:
    """Return the front matter; a base that is a local folder is not given as a hub name."""
    from huggingface_hub import ModelCardData

    library = {"peft": "peft", "diffusers": "diffusers", "comfyui": "diffusers"}.get(
        form, "flowsteer"
    )
    front: dict[str, Any] = {}
    if re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", base) and not Path(base).exists():
        front["base_model"] = base
        front["base_model_relation"] = "merge" if form == "merged" else "adapter"
    if metadata.get("licence"):
        front["license"] = str(metadata["licence"])
    if metadata.get("prompt_count") or metadata.get("prompts"):
        front["pipeline_tag"] = "text-to-image"
    tags = ["flow-map", "reward-fine-tuning", "flowsteer"]
    data = ModelCardData(
        library_name=library, tags=tags if form == "merged" else ["lora", *tags], **front
    )
    return f"---\n{data.to_yaml()}\n---"


def _summary(base: str, form: str, metadata: Mapping[str, Any]) -> str:
    text = f"This folder holds {FORMS[form]}."
    base_text = f"Base: {_code(base)}" if base else "Base: a flow without a name"
    if metadata.get("base_sha256"):
        base_text += f", weights {_code(metadata['base_sha256'])} (SHA-256, rounded to bfloat16)"
    if metadata.get("reward"):
        text += f" Tuned by the reward {_code(metadata['reward'])}"
        if metadata.get("objective"):
            text += f" with the objective {_code(metadata['objective'])}"
        text += "."
    return f"{text} {base_text}."


def _figures(figures: Mapping[str, Any]) -> str:
    rows = ["| | base | tuned |", "|---|---|---|"]
    for name, pair in figures.items():
        known = pair if isinstance(pair, Mapping) else {}
        cells = [number(known.get(k)) for k in ("base", "tuned")]
        rows.append(f"| {line(name)} | {cells[0]} | {cells[1]} |")
    return "\n".join(rows)


def _made(metadata: Mapping[str, Any], rank: int | None, alpha: float | None) -> str:
    """List the properties of the run, one per line."""
    lines = []
    if metadata.get("objective"):
        options = ", ".join(f"{k} {v}" for k, v in (metadata.get("options") or {}).items())
        lines.append(f"Objective: {metadata['objective']}{f' ({options})' if options else ''}")
    if metadata.get("reward"):
        lines.append(f"Reward: {metadata['reward']}")
    for key, name in (
        ("temperature", "Temperature (reward's units)"),
        ("steps", "Optimizer steps"),
        ("batch", "Effective batch (pictures per step)"),
        ("seed", "Seed"),
    ):
        if metadata.get(key) is not None:
            lines.append(f"{name}: {number(metadata[key])}")
    if rank is not None:
        lines.append(f"LoRA: rank {rank}, alpha {number(alpha)}")
    settings = metadata.get("settings") or {}
    if settings:
        lines.append("Settings: " + ", ".join(f"{k} {v}" for k, v in settings.items()))
    made = [f"flowsteer {metadata['flowsteer']}"] if metadata.get("flowsteer") else []
    made += [f"{k} {v}" for k, v in (metadata.get("versions") or {}).items()]
    if made:
        lines.append("Made by: " + ", ".join(made))
    prompts = metadata.get("prompts") or []
    count = metadata.get("prompt_count", len(prompts))
    if count:
        some = ", ".join(_code(p) for p in prompts[:EXAMPLES])
        more = ", ..." if count > EXAMPLES or count > len(prompts) else ""
        lines.append(f"Prompts: {count} ({some}{more})" if some else f"Prompts: {count}")
    text = "\n".join(f"- {one if one.startswith('Prompts') else line(one)}" for one in lines)
    return text or "Its file does not say how it was made."


def _limits(base: str, metadata: Mapping[str, Any]) -> str:
    own = metadata.get("licence")
    licence = f"Licence of these weights: {line(own)}. " if own else ""
    return (
        f"{licence}Adapters are of use with their base only, and are a work derived from it: the "
        "base's licence holds for what is made of both. What the reward was trained on, and its "
        "own licence, may matter too.\n\nA model that was tuned by a reward is better by that "
        "reward, and not in every other way: look at its pictures beside the base's before it is "
        "used for anything else."
    )


def _code(text: Any) -> str:
    return "`" + " ".join(str(text).split()).replace("`", "'") + "`"
