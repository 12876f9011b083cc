"""Read and write models: a folder with `config.json` and `model.safetensors`.

`steer.load("emoji")` returns an embedded model, `steer.load("path/to/folder")` your own, and
`steer.load("file.py:Name")` one that your Python file defines.
"""

import os
from pathlib import Path
from typing import Any

import torch

from steer import hub
from steer.adapters.attach import Layers, attach
from steer.adapters.compiling import compile_blocks
from steer.adapters.lora import Adapted
from steer.adapters.store import CONFIG, WEIGHTS, check_base, load_adapters, read_metadata
from steer.backends.community import lora_file, pipe_of, read_lora
from steer.backends.folders import INDEX, MODULAR, needs_diffusers
from steer.backends.loading import open_pipeline
from steer.backends.second_time import FOLDER
from steer.catalogue import MODELS
from steer.devices import usable_device
from steer.doors import is_pipeline
from steer.flow import FlowMap, device_of
from steer.models.folder import ZOO, folder_of, read_network, write_network
from steer.models.posterior_unet import load_posterior
from steer.models.second_timed import read_second_time, with_second_time
from steer.models.two_time import NetworkFlow, TwoTimeUNet
from steer.models.user_file import load_user_file

__all__ = ["MODELS", "load", "save"]

FORMAT = "steer.two-time-unet/1"

OPENING = ("config", "pipeline", "variant", "revision")
"""Options of `load` that say how a pipeline's files are read."""


def load(
    name: Any,
    lora: str | os.PathLike[str] | None = None,
    lora_scale: float = 1.0,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    *,
    compile: bool | str = False,
    **options: Any,
) -> FlowMap:
    """Load a flow map in evaluation mode, or wrap a diffusers pipeline as one.

    Args:
        name: "emoji"; a folder that holds config.json and model.safetensors; "file.py:Name", a
            flow map, a class of one, or a function that returns one, in your Python file; a
            diffusers pipeline: as an object, by its folder, by its hub id (owner/name), or in one
            .safetensors file with `config`, the folder or hub id of a pipeline of its class. A
            repository of the hub may be named hf://owner/name@revision, see `steer.hub`.
        lora: a folder of adapters, as `steer finetune` or peft writes them; for a pipeline also a
            file or folder that its own `load_lora_weights` reads (diffusers, kohya); or
            hf://owner/name@revision, with /FILE behind it where there are several.
        lora_scale: factor for their update: 0 is the base, 1 the tuned model.
        device: device of the model. Default: the CPU; a pipeline object or a model from a Python
            file is not moved.
        dtype: dtype of its parameters. Default: float32; bfloat16 for a pipeline that is not on
            the CPU; a pipeline object or a model from a Python file is not converted.
        compile: whether the blocks that the denoiser repeats are compiled (`torch.compile`), see
            `steer.adapters.compiling`; a name is that of torch's backend. The first calls take
            longer.
        **options: for pipelines, those of `steer.backends.pipeline.PipelineFlow` (height, width,
            cfg, guidance, negative_prompt, kind, frame, checkpointing, call) and of
            `steer.backends.loading.open_pipeline` (config, pipeline, variant, revision).

    Returns:
        The flow, with frozen parameters (those of a pipeline object are not changed); with `lora`
        a `steer.lora.Adapted`, whose `base` is the flow without adapters and whose `at(scale)` has
        them at any scale.

    Raises:
        ValueError: an unknown name (the message has similar ones), an invalid file, adapters that
            were made for another base, an option that the model does not have, a device that is
            not there.
        FileNotFoundError: a missing file.
        TypeError: the object in a Python file is not a flow map; a dtype that is not torch's.
        ConnectionError: the model hub cannot be reached, or denies access.
        ModuleNotFoundError: the model is a pipeline, and diffusers is not installed.
    """
    usable_device(device)
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype is one of torch's, such as torch.bfloat16, got {dtype!r}")
    text = isinstance(name, str | os.PathLike)
    name = _own_on_hub(name) if text else name
    made = load_user_file(name, device, dtype) if text else None
    embedded = os.fspath(name) if text and os.fspath(name) in MODELS else None
    given = ZOO / embedded if embedded else name if made is None else made
    if is_pipeline(given) or (text and made is None and _names_pipeline(given)):
        flow = _pipeline(given, device, dtype, options)
        if embedded:
            flow.name = embedded
    else:
        flow = _placed(_saved(name) if text else name, device, dtype) if made is None else made
        if options:
            raise ValueError(
                f"{', '.join(options)}: these options are for diffusers pipelines, and "
                f"{flow.name or type(flow).__name__!r} is none: leave them out"
            )
    if compile:
        compile_blocks(flow, compile)
    if lora is None:
        return flow
    place = hub.lora_path(lora)
    if flow.component and not (place / CONFIG).is_file():
        return attach(flow, _community(flow, place), lora_scale)
    return _adapted(flow, place, lora_scale)


def _own_on_hub(name: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """Return the folder of a model in our own format for its name on the hub; else the name."""
    found = hub.named(name)
    if found is None or found.file:
        return name
    if hub.cached(found, INDEX, MODULAR) is not None:
        return name
    files = "config.json", "model.safetensors"
    if any(hub.cached(found, file) is None for file in files):
        there = hub.listing(found)
        if INDEX in there or MODULAR in there or not set(files) <= set(there):
            return name
    return hub.folder_with(found, *files)


def _adapted(flow: FlowMap, lora: Path, scale: float) -> FlowMap:
    """Put a folder's adapters on a flow, together with their second time if they have one."""
    term = read_second_time(lora) if (lora / WEIGHTS).is_file() else None
    if term is None:
        return load_adapters(flow, lora, scale)
    check_base(flow, read_metadata(lora), lora)
    term.scale_by(scale)  # it is part of the update: at scale 0 a jump is that of the base
    name = flow.name
    flow = with_second_time(flow, term.to(device_of(flow.denoiser)))
    flow.name = name
    return load_adapters(flow, lora, scale, check=False)


def _placed(
    flow: FlowMap, device: str | torch.device | None, dtype: torch.dtype | None
) -> FlowMap:
    return flow.to(device=device, dtype=dtype or torch.float32).eval().requires_grad_(False)


def _community(flow: FlowMap, path: Path) -> Layers:
    """Return the layers of a LoRA that a pipeline's own loader reads."""
    file = lora_file(path)
    return read_lora(pipe_of(flow), flow.component, flow.denoiser, file)


def _names_pipeline(name: str | os.PathLike[str]) -> bool:
    """Return whether a text names a diffusers pipeline: its folder, file or hub id."""
    path = Path(name)
    if path.is_dir():
        files = {p.name for p in path.iterdir()}
        ours = {"config.json", "model.safetensors"} <= files
        part = any(file.startswith("diffusion_pytorch_model.") for file in files)
        return bool(files & {INDEX, MODULAR}) or (not ours and part)
    if path.suffix in {".safetensors", ".ckpt", ".bin", ".pt", ".gguf"}:
        return path.is_file()
    text = os.fspath(name)
    if hub.named(text) is not None:
        return True
    return text not in MODELS and not path.exists() and hub.is_hub_id(text)


def _pipeline(
    name: Any,
    device: str | torch.device | None,
    dtype: torch.dtype | None,
    options: dict[str, Any],
) -> FlowMap:
    needs_diffusers()
    from steer.backends.table import flow_of

    opening = {k: options.pop(k) for k in OPENING if k in options}
    if isinstance(name, str | os.PathLike) and (Path(name) / FOLDER).is_dir():
        options.setdefault("second_time", name)
    if not is_pipeline(name):
        return flow_of(open_pipeline(name, device=device, dtype=dtype, **opening), **options)
    if opening:
        raise ValueError(
            f"{', '.join(opening)}: for pipelines that are loaded, and this one is: leave it out"
        )
    flow = flow_of(name, **options)
    return flow if device is None and dtype is None else flow.to(device=device, dtype=dtype)


def _saved(name: str | os.PathLike[str]) -> FlowMap:
    """Load a model of our own format, by its name in `MODELS` or by its folder."""
    folder = folder_of(name)
    flow = NetworkFlow(read_network(folder, TwoTimeUNet, FORMAT))
    if (folder / "posterior" / "config.json").is_file():  # a finished one
        flow.take_posterior(load_posterior(name))
    flow.name = os.fspath(name)
    return flow


def save(
    flow: FlowMap, folder: str | os.PathLike[str], dtype: torch.dtype = torch.float32
) -> None:
    """Write a model's folder; each file is written atomically.

    Args:
        flow: the model.
        folder: created if it is missing.
        dtype: of the stored weights.

    Raises:
        TypeError: a flow with adapters, or one of another kind.
    """
    if isinstance(flow, Adapted):
        raise TypeError(
            "this flow has adapters: steer.lora.save_adapters(flow, folder) writes those alone, "
            "save(steer.lora.merged(flow), folder) the whole model"
        )
    if not isinstance(flow, NetworkFlow):
        raise TypeError(f"a {type(flow).__name__} has no folder format: save its weights yourself")
    write_network(flow.network, Path(folder), FORMAT, dtype)


# `import steer.load as m` gives the function, and `m.save` existed before modules moved
load.__dict__.update(save=save, MODELS=MODELS)
