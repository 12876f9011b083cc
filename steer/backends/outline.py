"""A pipeline without its weights: modules with the right shapes, from configurations only."""

import inspect
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from steer import hub
from steer.backends.folders import INDEX, MODULAR, needs_diffusers
from steer.backends.recording import modules_of
from steer.backends.sizes import PUBLIC
from steer.catalogue import MODELS
from steer.names import hint

__all__ = [
    "Blueprint", "blueprint", "default_size", "names_public", "outlined", "tiny_autoencoder",
]  # fmt: skip

TEXTS = "text_encoder"
"""Prefix of the names of text encoders."""


@dataclass(frozen=True)
class Blueprint:
    """The components of a pipeline.

    Attributes:
        pipeline: its class.
        parts: name of a component -> its class and its configuration, as in its file.
        source: description of the source of the configurations.
        size: default height and width; None: as the components specify.
        call: further arguments of its call.
        options: defaults of `PipelineFlow`.
        config: configuration of the pipeline itself.
    """

    pipeline: str
    parts: Mapping[str, tuple[str, Mapping[str, Any]]]
    source: str
    size: tuple[int, int] | None = None
    call: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)


def names_public(name: Any) -> str | None:
    """Return the short name of a public model, given that name or its repository."""
    text = os.fspath(name) if isinstance(name, str | os.PathLike) else ""
    found = hub.named(text)
    text = text if found is None else found.repo
    repositories = {one.hub: short for short, one in PUBLIC.items()}
    return text if text in PUBLIC else repositories.get(text)


def blueprint(model: Any) -> Blueprint:
    """Return the components of a pipeline, without reading weights.

    Args:
        model: a short name of `PUBLIC`, a folder that `save_pretrained` wrote (its JSON files are
            enough), a hub's owner/name whose JSON files are in the cache, or a live pipeline.

    Raises:
        ValueError: none of these, with the nearest names.
        FileNotFoundError: a folder without one of its configurations; the message names it.
    """
    if not isinstance(model, str | os.PathLike):
        return _of_live(model)
    folder = Path(model)
    if not folder.is_dir():
        cached = _cached(os.fspath(model))
        if cached is None:
            public = names_public(model)
            if public is None:
                raise ValueError(
                    f"cannot plan for {os.fspath(model)!r}: "
                    f"{hint(os.fspath(model), [*PUBLIC, *MODELS])}give a folder that "
                    "save_pretrained wrote, whose JSON files are enough, an owner/name of the hub "
                    "whose JSON files are here (hf download OWNER/NAME --include '*.json'), or "
                    f"one of {', '.join([*PUBLIC, *MODELS])}"
                )
            one = PUBLIC[public]
            return Blueprint(
                one.pipeline, one.parts, one.source, one.size, one.more, options=one.options
            )
        folder = cached
    return _of_folder(folder)


def _cached(name: str) -> Path | None:
    """Return the snapshot of a repository in the hub's cache; nothing is fetched."""
    found = hub.named(name) or (hub.Named(name) if hub.is_hub_id(name) else None)
    return None if found is None else hub.cached(found, INDEX, MODULAR)


def _of_folder(folder: Path) -> Blueprint:
    index = next((folder / f for f in (INDEX, MODULAR) if (folder / f).is_file()), None)
    if index is None:
        raise ValueError(f"{folder} is not a pipeline: it has no {INDEX} and no {MODULAR}")
    listed: dict[str, Any] = json.loads(index.read_text(encoding="utf-8"))
    parts = {}
    for name, said in listed.items():
        if name.startswith("_") or not isinstance(said, list) or len(said) < 2 or not said[1]:
            continue
        found = _config_of(folder / name)
        if found is not None:
            parts[name] = (str(said[1]), found)
        elif name in ("transformer", "unet", "vae"):
            raise FileNotFoundError(
                f"{folder / name / 'config.json'} is missing: a plan needs the JSON files of "
                f"{name}; copy them (weights are not needed)"
            )
    plain = {k: v for k, v in listed.items() if not isinstance(v, list)}
    return Blueprint(str(listed["_class_name"]), parts, f"{folder}", config=plain)


def _config_of(folder: Path) -> dict[str, Any] | None:
    for name in ("config.json", "scheduler_config.json"):
        if (folder / name).is_file():
            return dict(json.loads((folder / name).read_text(encoding="utf-8")))
    return None


def _of_live(pipe: Any) -> Blueprint:
    parts: dict[str, tuple[str, Mapping[str, Any]]] = {}
    for name, part in {**modules_of(pipe), "scheduler": pipe.scheduler}.items():
        config = getattr(part, "config", None)
        if config is None:
            continue
        found = config.to_dict() if hasattr(config, "to_dict") else dict(config)
        parts[name] = (type(part).__name__, found)
    plain = {k: v for k, v in dict(getattr(pipe, "config", None) or {}).items()
             if isinstance(v, str | int | float | bool)}  # fmt: skip
    return Blueprint(type(pipe).__name__, parts, "the live pipeline", config=plain)


# ------------------------------------------------------------------ building


def outlined(
    plan: Blueprint, mode: AbstractContextManager[Any], dtype: torch.dtype
) -> tuple[Any, dict[str, nn.Module]]:
    """Return a pipeline whose denoiser and autoencoder have no values, and its text encoders.

    The text encoders are on torch's meta device: their size is counted, and they are never called.

    Args:
        plan: its components.
        mode: a `FakeTensorMode`, in which parameters have no values.
        dtype: of the parameters.

    Raises:
        ValueError: classes that this release of diffusers or transformers does not have.
    """
    diffusers = needs_diffusers()
    made: dict[str, Any] = {}
    texts: dict[str, nn.Module] = {}
    for name, (kind, config) in plan.parts.items():
        if name.startswith(TEXTS):
            texts[name] = _text_encoder(kind, config, dtype)
            continue
        chosen = getattr(diffusers, kind, None)
        if chosen is None or not hasattr(chosen, "from_config"):
            continue  # a guider, a feature extractor: no weights to count
        if issubclass(chosen, nn.Module):
            with mode, _quietly(), _default(dtype):
                made[name] = _kept_in_float32(chosen.from_config(dict(config))).eval()
                made[name].requires_grad_(False)
        elif name == "scheduler":
            with _quietly():
                made[name] = chosen.from_config(dict(config))
    return _pipeline(diffusers, plan, made), texts


def _pipeline(diffusers: Any, plan: Blueprint, made: Mapping[str, Any]) -> Any:
    kind = getattr(diffusers, plan.pipeline, None)
    if kind is None:
        raise ValueError(
            f"this diffusers ({diffusers.__version__}) has no pipeline {plan.pipeline!r}: take a "
            "release that has it"
        )
    if issubclass(kind, diffusers.ModularPipeline):
        from diffusers.modular_pipelines import flux3

        distilled = plan.pipeline == "Flux3DistilledModularPipeline"
        blocks: Any = flux3.Flux3DistilledAutoBlocks() if distilled else flux3.Flux3AutoBlocks()
        blocks.sub_blocks.pop("prompt_upsampler", None)
        with _quietly():
            pipe = kind(blocks)
            pipe.update_components(**made)
        return pipe
    known = inspect.signature(kind.__init__).parameters
    given = {k: made.get(k) for k, p in known.items() if k != "self" and p.default is p.empty}
    given |= {k: v for k, v in {**plan.config, **made}.items() if k in known}
    if "requires_safety_checker" in known:
        given["requires_safety_checker"] = False
    with _quietly():
        return kind(**given)


def _text_encoder(kind: str, config: Mapping[str, Any], dtype: torch.dtype) -> nn.Module:
    import transformers

    chosen = getattr(transformers, kind, None)
    if chosen is None:
        raise ValueError(
            f"this transformers ({transformers.__version__}) has no {kind!r}: take a release "
            "that has it"
        )
    with torch.device("meta"), _default(dtype), _quietly():
        return chosen(chosen.config_class.from_dict(dict(config)))


def _kept_in_float32(module: nn.Module) -> nn.Module:
    """Convert those parameters to float32 that diffusers keeps in it for any model dtype."""
    kept = set(getattr(module, "_keep_in_fp32_modules", None) or ())
    for name, one in module.named_modules():
        if kept & set(name.split(".")):
            for key, p in one.named_parameters(recurse=False):
                one._parameters[key] = nn.Parameter(p.detach().float(), False)
    for key, p in module.named_parameters(recurse=False):
        if key in kept:
            module._parameters[key] = nn.Parameter(p.detach().float(), False)
    return module


@contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _quietly() -> Iterator[None]:
    from diffusers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)


def default_size(plan: Blueprint, pipe: Any) -> tuple[int, int]:
    """Return a pipeline's default height and width.

    Raises:
        ValueError: its files do not specify a size.
    """
    if plan.size is not None:
        return plan.size
    known = inspect.signature(type(pipe).__call__).parameters
    said = [getattr(known.get(name), "default", None) for name in ("height", "width")]
    if all(isinstance(number, int) for number in said):
        return said[0], said[1]  # type: ignore[return-value]
    side = getattr(pipe, "default_sample_size", None)
    if side is None and hasattr(pipe, "unet"):
        side = pipe.unet.config.get("sample_size")
    if isinstance(side, int):
        return (side * int(pipe.vae_scale_factor),) * 2
    raise ValueError(
        f"{plan.source} does not give the size of its pictures: give height and width"
    )


def tiny_autoencoder(
    flow: Any, mode: AbstractContextManager[Any], dtype: torch.dtype
) -> nn.Module | None:
    """Return an `AutoencoderTiny` without values for a flow's latents; None if there is none.

    The published ones (TAESD, TAESDXL, TAESD3, TAEF1) downscale by 8 and have the default sizes.
    """
    config = flow.vae.config
    channels = config.get("latent_channels")
    levels = config.get("block_out_channels") or ()
    if channels not in (4, 16) or len(levels) != 4 or type(flow.vae).__name__ != "AutoencoderKL":
        return None
    with mode, _quietly(), _default(dtype):
        made = needs_diffusers().AutoencoderTiny(latent_channels=channels)
    return made.eval().requires_grad_(False)
