"""Instructions for using a folder of adapters: lines of a card, and of the commands in it."""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["how_to_use", "line", "number"]

LOADERS = {
    "pipeline": (
        "pipe.load_lora_weights({where}, adapter_name='reward')",
        "pipe.set_adapters('reward', {scale})",
    ),
    "denoiser": (
        "pipe.{component}.load_lora_adapter({where}, prefix='{component}', "
        "weight_name='pytorch_lora_weights.safetensors', adapter_name='reward')",
        "pipe.{component}.set_adapters('reward', {scale})",
    ),
}
"""Kind of LoRA loader in diffusers -> the code."""


def how_to_use(where: str, repository: str | None, form: str, metadata: Mapping[str, Any]) -> str:
    """Return how to load the adapters: three lines of Python, and the command."""
    scale = metadata.get("scale")
    chosen = 1 if scale is None else scale
    base = str(metadata.get("base") or "path/to/the/base")
    prompt = str(next(iter(metadata.get("prompts") or []), "a fox"))
    reward = str(metadata.get("reward") or "clip")
    quoted = {
        k: json.dumps(v, ensure_ascii=False)
        for k, v in {"base": base, "where": where, "prompt": prompt, "reward": reward}.items()
    }
    place = json.dumps(repository or where)
    if form == "comfyui":
        return (
            f"Put the file into ComfyUI's `models/loras`, and load it at strength {chosen}.\n\n"
            + _advice(scale, metadata)
        )
    lines = _diffusers(quoted["base"], place, quoted["prompt"], chosen, metadata)
    pipeline = _block(lines, "python")
    if form == "diffusers":
        return f"{pipeline}\n\n{_advice(scale, metadata)}"
    loaded = f"{quoted['base']}, lora={quoted['where']}, lora_scale={chosen}"
    model = ["--model", base, "--lora", where, "--lora-scale", str(chosen)]
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
    if form == "peft" and metadata.get("lora_loader") in LOADERS:
        blocks = ["With diffusers:", pipeline, "With steer:", *blocks]
    if repository is not None:
        fetched = ["hf", "download", repository, "--local-dir", where]
        blocks.insert(0, _block([shlex.join(fetched)]))
    return "\n\n".join([*blocks, *([] if form == "merged" else [_advice(scale, metadata)])])


def _diffusers(
    base: str, where: str, prompt: str, scale: float, metadata: Mapping[str, Any]
) -> list[str]:
    """Return the code that loads adapters into a pipeline and makes a picture."""
    known = {
        name: _word(metadata.get(name), default)
        for name, default in {
            "pipeline": "", "component": "transformer", "lora_loader": "pipeline",
            "output": "images",
        }.items()
    }  # fmt: skip
    kind, made = known["pipeline"], f"pictures = pipe({prompt}).{known['output']}"
    load = [
        each.format(where=where, scale=scale, component=known["component"])
        for each in LOADERS.get(known["lora_loader"], LOADERS["pipeline"])
    ]
    if not kind:
        return [*load, made]
    if "Modular" in kind:
        return [
            "from diffusers import ModularPipeline",
            f"pipe = ModularPipeline.from_pretrained({base})",
            "pipe.load_components()",
            *load,
            f"pictures = pipe(prompt={prompt}, output='images')",
        ]
    return [
        f"from diffusers import {kind}", f"pipe = {kind}.from_pretrained({base})", *load, made
    ]  # fmt: skip


def _word(value: Any, default: str) -> str:
    """Return a name if it is safe in code, else the default."""
    return value if isinstance(value, str) and re.fullmatch(r"\w+", value) else default


def _block(lines: Sequence[str], language: str = "") -> str:
    return "\n".join([f"```{language}", *(" ".join(each.split()) for each in lines), "```"])


def _advice(scale: Any, metadata: Mapping[str, Any]) -> str:
    """Return the recommended scale, with the reason."""
    share = metadata.get("baked_scale", 1)
    one = "what was tuned" if share == 1 else f"{number(share)} of the tuned update"
    law = (
        f"At scale 0 the model is the base bit for bit, at 1 {one}; in between, a smaller scale "
        "has less reward and more of the base's diversity."
    )
    if scale is None:
        return f"Recommended scale: 1; no other was measured. {law}"
    if scale == 0:
        return (
            f"**Recommended scale: 0, which is the base**: every scale that was measured raised "
            f"an alarm (diversity, drift or the held-out judge). {law}"
        )
    return (
        f"Recommended scale: {number(scale)}, the best by the held-out judge, or the largest "
        f"where there was none, among the scales that raised no alarm. {law}"
    )


def line(text: Any) -> str:
    """Reduce a text to one line of Markdown, without tables, tags or headings."""
    return re.sub(r"([|<>\[\]`*_#\\])", r"\\\1", " ".join(str(text).split()))


def number(value: Any) -> str:
    """Format a figure for a card, or a pair as value and error; – if there is none."""
    if value is None:
        return "–"
    if isinstance(value, list | tuple) and len(value) == 2:
        return f"{number(value[0])} ± {number(value[1])}"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:.4g}" if isinstance(value, float) else f"{value}"
    return line(value)
