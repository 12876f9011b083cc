"""Inspect a pipeline's folder: whether it is complete, and the variant of its weights."""

import json
import re
from pathlib import Path
from typing import Any

__all__ = ["INDEX", "MODULAR", "class_of", "needs_diffusers", "only_variant", "variant_of"]

INDEX, MODULAR = "model_index.json", "modular_model_index.json"


def needs_diffusers() -> Any:
    """Return diffusers.

    Raises:
        ModuleNotFoundError: it is not installed; the message has pip's line.
    """
    try:
        import diffusers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "pipelines need diffusers, which is not installed: pip install 'flowsteer[diffusers]'"
        ) from error
    return diffusers


def class_of(diffusers: Any, name: str, where: str) -> Any:
    """Return a class of pipelines by its name.

    Raises:
        ValueError: this release has no class of that name.
    """
    found = getattr(diffusers, name, None)
    if not (isinstance(found, type) and hasattr(found, "from_pretrained")):
        raise ValueError(
            f"{where} names the class {name!r}, which diffusers {diffusers.__version__} does not "
            "have as a pipeline: take a release that has it, or name another with pipeline="
        )
    return found


def variant_of(folder: Path, variant: str | None) -> str | None:
    """Return the variant of the weights in a folder; refuse a folder that is not complete.

    No weights are read.

    Args:
        folder: a folder that `save_pretrained` wrote.
        variant: the requested variant. Default: no variant, or the only one if a part has no
            weights without a variant.
    """
    index = next((folder / f for f in (INDEX, MODULAR) if (folder / f).is_file()), None)
    if index is None:
        raise ValueError(
            f"{folder} is not a pipeline: it has no {INDEX}"
            + _part_of_pipeline(folder)
            + "; give the folder that pipe.save_pretrained wrote"
        )
    parts: dict[str, Any] = json.loads(index.read_text(encoding="utf-8"))
    class_of(needs_diffusers(), str(parts.get("_class_name")), str(index))
    missing: list[str] = []
    pickled: list[str] = []
    weighted: dict[str, list[str]] = {}
    for name, said in parts.items():
        kind = said[1] if isinstance(said, list) and len(said) > 1 else None
        if name.startswith("_") or kind is None or index.name == MODULAR:
            continue
        part = folder / name
        if not part.is_dir():
            missing.append(f"{name}/")
        elif re.search("Model|Encoder|Transformer|Autoencoder|Checker|UNet", kind):
            weighted[name] = [p.name for p in part.glob("*.safetensors")]
            others = [p.name for p in (*part.glob("*.bin"), *part.glob("*.ckpt"))]
            if not weighted[name]:
                found = f"{name}/{others[0] if others else '*.safetensors'}"
                (pickled if others else missing).append(found)
    if variant is None:
        variant = only_variant([f"{part}/{f}" for part, files in weighted.items() for f in files])
    for name, files in weighted.items():
        kinds = set(map(_said, files))
        if files and not kinds & {variant, None}:
            wanted = f"variant {variant!r}" if variant else "weights without a variant"
            has = ", ".join(f"variant={v!r}" for v in sorted(filter(None, kinds)))
            missing.append(f"{name}/ ({wanted}; what it has: {has})")
        elif files:
            chosen = variant if variant in kinds else None
            missing += [f"{name}/{shard}" for shard in _lost_shards(folder / name, chosen)]
    if variant is not None and not any(variant in map(_said, f) for f in weighted.values()):
        missing.append(f"weights of variant {variant!r}")
    if pickled:
        raise ValueError(
            f"{folder} has pickled weights, which can run code when they are read: "
            f"{', '.join(pickled)}. Save the pipeline again with safe_serialization=True"
        )
    if missing:
        raise FileNotFoundError(
            f"{folder} is incomplete: {', '.join(missing)} missing. Copy it again, or save the "
            "pipeline with pipe.save_pretrained"
        )
    return variant


def _lost_shards(part: Path, variant: str | None) -> list[str]:
    """Return the missing files of weights that are sharded over several files with an index."""
    wanted: set[str] = set()
    for index in part.glob("*.safetensors.index*.json"):
        try:
            said = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(
                f"{index} does not say which file has which weights: copy it again"
            ) from None
        wanted |= {file for file in said if _said(file) == variant}
    return sorted(file for file in wanted if not (part / file).is_file())


def _said(file: str) -> str | None:
    """Return the variant that the name of a weights file contains.

    >>> _said("model.fp16.safetensors"), _said("model-00001-of-00002.safetensors")
    ('fp16', None)
    """
    found = re.search(r"\.([a-z]\w*)(-\d+-of-\d+)?\.safetensors$", file)
    return found and found[1]


def _part_of_pipeline(folder: Path) -> str:
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["_class_name"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return f"; it holds a {kind}, which is one part of a pipeline"


def only_variant(files: list[str]) -> str | None:
    """Return the variant of a repository if some part has only weights of that variant.

    >>> only_variant(["unet/x.fp16.safetensors", "vae/y.fp16.safetensors", "vae/y.safetensors"])
    'fp16'
    """
    parts: dict[str, set[str | None]] = {}
    for file in files:
        part, _, name = file.rpartition("/")
        if part and name.endswith(".safetensors"):
            parts.setdefault(part, set()).add(_said(name))
    alone = {v for kinds in parts.values() if None not in kinds for v in kinds}
    return alone.pop() if len(alone) == 1 else None
