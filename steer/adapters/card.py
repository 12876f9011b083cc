"""The model card of a folder of adapters: what it is, what it was made of, how to use it.

The card is the folder's `README.md`, Markdown under the YAML front matter that model hubs read.
It says what the adapters' file says of itself (`read_metadata`), and nothing else.
"""

import json
import math
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from steer.adapters.store import read_config, read_metadata
from steer.files import write_atomically

__all__ = ["FORMS", "PICTURES", "card", "known_notes", "write_card"]

PICTURES = {
    "grid.png": "base and tuned, same seeds",
    "samples.png": "base and tuned, same seeds",
    "front.png": "reward against diversity and drift, by the scale of the adapters",
}
"""Pictures that a card shows where they lie beside it -> what they are."""

FORMS = {
    "peft": "LoRA adapters for `steer.load` and peft",
    "diffusers": "LoRA adapters for diffusers' `load_lora_weights`",
    "merged": "a whole model with the adapters added to its weights",
}
"""What a folder can hold -> a line."""

EXAMPLES = 8
"""Prompts that a card shows."""

_KINDS: dict[str, tuple[type, ...]] = (
    dict.fromkeys(("options", "settings", "versions", "figures"), (Mapping,))
    | dict.fromkeys(("scale", "baked_scale", "prompt_count"), (int, float))
    | {"prompts": (list,), "base": (str,)}
)
"""What values of the notes have to be, where a card or an export takes them apart."""


def known_notes(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a file says of itself, without values that are not of their kind.

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
        metadata: what the adapters' file says of itself: base, base_sha256, reward, objective,
            options, prompts, prompt_count, temperature, steps, batch, seed, scale (recommended),
            figures ({name: {"base": x, "tuned": y}}), settings, versions, licence, and baked_scale
            (the share of what was tuned that is scale 1 now). What is missing is left out.
        where: the folder, as it is written in the lines that load it.
        repository: where a model hub has it, user/name.
        form: a key of `FORMS`.
        pictures: names of pictures beside the card.
        rank: of the adapters.
        alpha: their update is scaled by alpha / rank.
    """
    metadata = known_notes(metadata)
    base = str(metadata.get("base") or "")
    reward = metadata.get("reward")
    title = f"{base or 'a flow map'}, tuned by {reward}" if reward else f"{base}, tuned"
    parts = [_front(base, form, metadata), f"# {_line(title)}", _summary(base, form, metadata)]
    shown = [f"![{PICTURES.get(name, name)}]({name})" for name in pictures]
    parts += ["\n".join(shown)] if shown else []
    parts += ["## Use", _use(where, repository, form, metadata)]
    if metadata.get("figures"):
        parts += ["## Figures", _figures(metadata["figures"])]
    parts += ["## How it was made", _made(metadata, rank, alpha)]
    parts += ["## Licence and limits", _limits(base, metadata)]
    return "\n\n".join(parts) + "\n"


def write_card(folder: str | os.PathLike[str], where: str | None = None) -> Path:
    """Write the card of a folder of adapters, `README.md`, from what their file says of itself.

    Args:
        folder: as `save_adapters` writes it; pictures that lie in it are shown.
        where: how to write the folder in the lines that load it. Default: its name.

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
    """Return the front matter: a base that is a folder on somebody's disk is no hub's name."""
    from huggingface_hub import ModelCardData

    library = {"peft": "peft", "diffusers": "diffusers"}.get(form, "flowsteer")
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


def _use(where: str, repository: str | None, form: str, metadata: Mapping[str, Any]) -> str:
    """Say how to load it: three lines of Python, and the command."""
    scale = metadata.get("scale")
    number = 1 if scale is None else scale
    base = str(metadata.get("base") or "path/to/the/base")
    prompt = str(next(iter(metadata.get("prompts") or []), "a fox"))
    reward = str(metadata.get("reward") or "clip")
    quoted = {
        k: json.dumps(v, ensure_ascii=False)
        for k, v in {"base": base, "where": where, "prompt": prompt, "reward": reward}.items()
    }
    if form == "diffusers":
        python = [
            f"pipe.load_lora_weights({json.dumps(repository or where)}, adapter_name='reward')",
            f"pipe.set_adapters('reward', {number})",
            f"pictures = pipe({quoted['prompt']}).images",
        ]
        return f"{_block(python, 'python')}\n\n{_advice(scale, metadata)}"
    loaded = f"{quoted['base']}, lora={quoted['where']}, lora_scale={number}"
    model = ["--model", base, "--lora", where, "--lora-scale", str(number)]
    if form == "merged":
        loaded, model = quoted["where"], ["--model", where]
    python = [
        "import rewards, steer",
        f"flow = steer.load({loaded})",
        f"steer.sample(flow, rewards.load({quoted['reward']}), [{quoted['prompt']}], "
        'method="none").save("pictures")',
    ]
    words = ["steer", "sample", *model, "--reward", reward, "--prompt", prompt, "--method", "none"]
    blocks = [_block(python, "python"), _block([shlex.join(words)])]
    if repository is not None:
        fetched = ["hf", "download", repository, "--local-dir", where]
        blocks.insert(0, _block([shlex.join(fetched)]))
    return "\n\n".join([*blocks, *([] if form == "merged" else [_advice(scale, metadata)])])


def _block(lines: Sequence[str], language: str = "") -> str:
    return "\n".join([f"```{language}", *(" ".join(line.split()) for line in lines), "```"])


def _advice(scale: Any, metadata: Mapping[str, Any]) -> str:
    """Say which scale is recommended, and why."""
    share = metadata.get("baked_scale", 1)
    one = "what was tuned" if share == 1 else f"{_number(share)} of what was tuned"
    law = (
        f"At scale 0 the model is the base bit for bit, at 1 {one}; between them less reward buys "
        "more of the base's own diversity."
    )
    if scale is None:
        return f"Recommended scale: 1; no other was measured. {law}"
    if scale == 0:
        return (
            f"**Recommended scale: 0, which is the base**: every scale that was measured raised "
            f"an alarm (diversity, drift or the held-out judge). {law}"
        )
    return (
        f"Recommended scale: {_number(scale)}, the best by the held-out judge, or the largest "
        f"where there was none, among the scales that raised no alarm. {law}"
    )


def _figures(figures: Mapping[str, Any]) -> str:
    rows = ["| | base | tuned |", "|---|---|---|"]
    for name, pair in figures.items():
        known = pair if isinstance(pair, Mapping) else {}
        cells = [_number(known.get(k)) for k in ("base", "tuned")]
        rows.append(f"| {_line(name)} | {cells[0]} | {cells[1]} |")
    return "\n".join(rows)


def _made(metadata: Mapping[str, Any], rank: int | None, alpha: float | None) -> str:
    """List what the run was, a line each."""
    lines = []
    if metadata.get("objective"):
        options = ", ".join(f"{k} {v}" for k, v in (metadata.get("options") or {}).items())
        lines.append(f"Objective: {metadata['objective']}{f' ({options})' if options else ''}")
    if metadata.get("reward"):
        lines.append(f"Reward: {metadata['reward']}")
    for key, name in (
        ("temperature", "Temperature (reward's units)"),
        ("steps", "Optimizer steps"),
        ("batch", "Effective batch (pictures a step)"),
        ("seed", "Seed"),
    ):
        if metadata.get(key) is not None:
            lines.append(f"{name}: {_number(metadata[key])}")
    if rank is not None:
        lines.append(f"LoRA: rank {rank}, alpha {_number(alpha)}")
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
    text = "\n".join(f"- {line if line.startswith('Prompts') else _line(line)}" for line in lines)
    return text or "Its file says nothing of how it was made."


def _limits(base: str, metadata: Mapping[str, Any]) -> str:
    own = metadata.get("licence")
    licence = f"Licence of these weights: {_line(own)}. " if own else ""
    return (
        f"{licence}Adapters are of use with their base only, and are a work derived from it: the "
        "base's licence holds for what is made of both. What the reward was trained on, and its "
        "own licence, may matter too.\n\nA model that was tuned by a reward is better by that "
        "reward, and not in every other way: look at its pictures beside the base's before it is "
        "used for anything else."
    )


def _line(text: Any) -> str:
    """Keep a text to one line of Markdown, without tables, tags or headings of its own."""
    return re.sub(r"([|<>\[\]`*_#\\])", r"\\\1", " ".join(str(text).split()))


def _code(text: Any) -> str:
    return "`" + " ".join(str(text).split()).replace("`", "'") + "`"


def _number(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, list | tuple) and len(value) == 2:
        return f"{_number(value[0])} ± {_number(value[1])}"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:.4g}" if isinstance(value, float) else f"{value}"
    return _line(value)
