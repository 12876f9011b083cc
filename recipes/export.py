"""`steer export`: write adapters as a clean folder, as diffusers' file, or merged into weights."""

import math
import os
import re
import shutil
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
from rich.console import Console

import steer
from recipes.inputs import load_model
from steer.adapters.card import PICTURES, card, known_notes
from steer.adapters.config import plain_config
from steer.adapters.lora import Adapted
from steer.adapters.merge import merged
from steer.adapters.shared import SHARED, shared_file
from steer.adapters.store import CONFIG, WEIGHTS, read_config, read_metadata, read_weights
from steer.files import expanded, pack, refuse_existing, whole_folder, write_atomically
from steer.hub import lora_path
from steer.models.loading import save

__all__ = ["diffusers_file", "export", "push_folder"]

DIFFUSERS = SHARED
"""The file name that diffusers expects."""

COMFYUI = "lora.safetensors"
"""The file for ComfyUI, which accepts any name."""

Format = Literal["peft", "diffusers", "comfyui", "merged"]


def export(
    lora: Path,
    out: Path,
    format: Format = "peft",
    scale: float | None = None,
    model: str | None = None,
    component: str | None = None,
    inside: str | None = None,
    push: str | None = None,
    private: bool = False,
    overwrite: bool = False,
) -> Path:
    """Write adapters in the formats of other programs, and optionally upload them to a hub.

    The folder is written atomically.

    Args:
        lora: a folder of adapters, as `steer finetune` or peft writes them.
        out: the folder to write.
        format: peft: a folder for `steer --lora` and peft; diffusers: the file that
            `pipe.load_lora_weights` reads; comfyui: the file that ComfyUI reads (both for models
            that are the denoiser of a diffusers pipeline); merged: a whole model for `steer
            --model`.
        scale: make this scale of the adapters the new scale 1.
        model: the base, for merged. Default: the one that the adapters name, if it is an embedded
            model (`steer models`); other names in a file are not loaded.
        component: name of the denoiser in the pipeline (diffusers, comfyui): transformer or unet.
            Default: as stored in the adapters, else transformer.
        inside: attribute of the model that is this denoiser (diffusers, comfyui). Default: the
            first part of the layers' names, if all share it.
        push: hub repository, user/name, to upload the folder to.
        private: make that repository private.
        overwrite: replace the folder if it exists.

    Returns:
        The folder.
    """
    out = expanded(out)
    refuse_existing(out, overwrite)
    pipes = ("diffusers", "comfyui")
    own = {"model": (("merged",), model), "component": (pipes, component)}
    for option, (whose, value) in {**own, "inside": (pipes, inside)}.items():
        if value is not None and format not in whose:
            raise ValueError(
                f"{option} is for format {' or '.join(whose)}, not {format}: leave it out"
            )
    if scale is not None and not 0 < scale < math.inf:
        raise ValueError(f"scale must be above zero and finite, got {scale}: 0 is the base itself")
    if private and push is None:
        raise ValueError("private needs push: give --push user/name, or leave private out")
    if push is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", push):
        raise ValueError(f"push takes a hub repository, user/name, got {push!r}")
    factor, lora = 1.0 if scale is None else scale, lora_path(lora)
    notes, config = known_notes(read_metadata(lora)), read_config(lora)
    if notes.get("scale"):
        notes["scale"] /= factor
    if scale is not None:
        notes["baked_scale"] = notes.get("baked_scale", 1) * scale
    console = Console(stderr=True)
    with whole_folder(out, overwrite) as scratch:
        if format == "peft":
            _write_peft(lora, scratch, config, notes, factor)
        elif format in pipes:
            named = component or _component(notes)
            if format == "diffusers":
                data = diffusers_file(lora, named, inside, factor, notes)
            else:
                data = _comfyui(lora, named, inside, factor, notes)
            write_atomically(scratch / (DIFFUSERS if format == "diffusers" else COMFYUI), data)
        else:
            save(merged(_adapted(model or _named_base(lora, notes), lora, factor)), scratch)
        pictures = [name for name in PICTURES if _copy_picture(lora, scratch, name, console)]
        whole = format == "merged"
        text = card(
            notes, out.name, repository=push, form=format, pictures=pictures,
            rank=None if whole else config["r"],
            alpha=None if whole else config["lora_alpha"] * factor,
        )  # fmt: skip
        write_atomically(scratch / "README.md", text.encode())
    console.print(f"{out}: {', '.join(sorted(p.name for p in out.iterdir()))}")
    if format in pipes and notes.get("base") in steer.MODELS:
        console.print(
            f"{notes['base']} is not a diffusers pipeline: the file fits a denoiser with the same "
            "layer names as this model; steer itself reads the peft format"
        )
    if push is not None:
        console.print(f"pushed to {push_folder(out, push, private)}")
    return out


def _component(notes: Mapping[str, Any]) -> str:
    """Return the component in a pipeline that the adapters' metadata name, else transformer."""
    said = notes.get("component")
    return said if said in ("transformer", "unet") else "transformer"


def _comfyui(
    lora: Path, component: str, inside: str | None, scale: float, notes: Mapping[str, Any]
) -> bytes:
    from steer.backends.comfyui import comfyui_file

    known = str(notes.get("pipeline") or "")
    try:
        return comfyui_file(
            read_config(lora), read_weights(lora), component, known, inside, scale, notes
        )
    except ValueError as error:
        raise ValueError(f"{lora / WEIGHTS}: {error}") from None


def _named_base(lora: Path, notes: Mapping[str, Any]) -> str:
    """Return the base that a file of adapters names, if it is an embedded model."""
    base = str(notes.get("base") or "")
    if base in steer.MODELS:
        return base
    if not base:
        raise ValueError(f"{lora} does not name its base: give it with --model")
    raise ValueError(
        f"{lora} names {base!r} as its base, which is not one of the embedded models "
        f"({', '.join(steer.MODELS)}), and no other model is loaded because a file names it: give "
        "the base with --model"
    )


def _copy_picture(lora: Path, folder: Path, name: str, console: Console) -> bool:
    """Copy a picture in the adapters' folder; return whether there is one.

    Links are not followed: they may lead to any file of this machine, and the folder may be
    uploaded.
    """
    try:
        number = os.open(lora / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        if (lora / name).is_symlink():
            console.print(f"{lora / name} is a link and is not copied: copy the picture itself")
        return False
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        return False
    with os.fdopen(number, "rb") as source, (folder / name).open("wb") as target:
        shutil.copyfileobj(source, target)
    return True


def _adapted(base: str, lora: Path, scale: float) -> Adapted:
    flow = load_model(base, lora=lora, lora_scale=scale)
    assert isinstance(flow, Adapted)
    return flow


def _write_peft(
    lora: Path, folder: Path, config: dict[str, Any], notes: dict[str, Any], scale: float
) -> None:
    """Write the adapters' two files again, with the scale in alpha."""
    patterns = {k: v * scale for k, v in config["alpha_pattern"].items()}
    scaled = {**config, "lora_alpha": config["lora_alpha"] * scale, "alpha_pattern": patterns}
    state = safetensors.torch.load_file(lora / WEIGHTS)
    write_atomically(folder / WEIGHTS, pack(state, notes))
    write_atomically(folder / CONFIG, plain_config(scaled))


def diffusers_file(
    lora: Path,
    component: str = "transformer",
    inside: str | None = None,
    scale: float = 1.0,
    notes: dict[str, Any] | None = None,
) -> bytes:
    """Return a folder's adapters as the file that diffusers' `load_lora_weights` reads.

    Args:
        lora: the folder.
        component: name of the denoiser in the pipeline.
        inside: the attribute of the model that is this denoiser.
        scale: scale of the adapters that becomes scale 1.
        notes: further entries of the file's header.

    Raises:
        ValueError: see `steer.adapters.shared.folded`.
    """
    try:
        return shared_file(read_config(lora), read_weights(lora), component, inside, scale, notes)
    except ValueError as error:
        raise ValueError(f"{lora / WEIGHTS}: {error}") from None


def push_folder(folder: Path, repository: str, private: bool = False) -> str:
    """Upload a folder to a model hub, and return its address.

    Raises:
        ConnectionError: the hub cannot be reached, or denies access.
    """
    from huggingface_hub import HfApi

    hub = HfApi()
    try:
        hub.create_repo(repository, private=private, exist_ok=True)
        hub.upload_folder(repo_id=repository, folder_path=folder, commit_message="Add adapters")
    except Exception as error:  # one remedy for all hub errors
        raise ConnectionError(
            f"{folder} is complete, but could not be uploaded to {repository} "
            f"({str(error).splitlines()[0] if str(error) else type(error).__name__}): log in with "
            f"`hf auth login`, be online, and give `hf upload {repository} {folder}`"
        ) from error
    return f"https://huggingface.co/{repository}"
