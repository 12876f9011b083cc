"""Classifiers of timm and torchvision, with published weights or the user's own."""

import math
from pathlib import Path
from typing import Any

from torch import nn

from rewards.models.hub import Source, fetch, fetch_url, state
from rewards.models.preprocess import Preprocess
from steer.reward import hint

__all__ = ["LIBRARIES", "of_timm", "put"]

_FILES = ("config.json", "model.safetensors")
"""Files of a hub repository in timm's layout."""


def put(model: nn.Module, file: str | Path, what: str) -> None:
    """Load all weights of a file into a classifier.

    Args:
        model: the network.
        file: .safetensors or .pth with tensors only.
        what: the model, for the message.

    Raises:
        FileNotFoundError: no such file.
        ValueError: they do not fit.
    """
    try:
        model.load_state_dict(state(file, "classifier", "weights"))
    except RuntimeError as error:
        raise ValueError(
            f"the weights {str(file)!r} do not fit {what}: {_short(error)}. Give the weights of "
            "exactly this model; if its classes are not ImageNet's, also give names=FILE with all "
            "of them"
        ) from error


def _timm(
    name: str, weights: str | Path | None, classes: int | None
) -> tuple[nn.Module, Preprocess, list[str]]:
    import timm
    from timm.data import ImageNetInfo, infer_imagenet_subset

    options = {} if classes is None else {"num_classes": classes}
    overlay: dict[str, Any] = dict(options)
    if Path(name).is_dir():
        named = f"local-dir:{name}"
    elif "/" in name:
        folder = fetch(Source(name.removeprefix("hf-hub:"), _FILES), "classifier")
        named = f"local-dir:{folder}"
    else:
        architecture, _, tag = name.partition(".")
        if weights is not None and not _is_file(weights):
            tag = str(weights)
        named = f"{architecture}.{tag}" if tag else architecture
        if not timm.is_model(architecture):
            raise ValueError(
                f"unknown model {name!r} of timm: {hint(name, timm.list_models())}"
                "timm.list_models() has them all; a folder or org/name of the hub is taken too"
            )
        known = timm.list_pretrained(f"{architecture}.*")
        if tag and named not in known:
            raise ValueError(
                f"unknown weights {named!r} of timm: {hint(named, known)}Known: "
                f"{', '.join(known) or 'none'}; or give a file that exists"
            )
        if weights is None or not _is_file(weights):
            overlay["file"] = str(_published(timm.get_pretrained_cfg(named), named))
    if weights is not None and _is_file(weights):
        state(weights, "classifier", "weights")  # its error messages are better
        overlay |= {"file": str(weights), "source": ""}
    try:
        model = timm.create_model(
            named, pretrained=True, pretrained_cfg_overlay=overlay, **options
        )
    except Exception as error:
        raise ValueError(
            f"cannot load timm's {name!r}: {_short(error)}. Give the weights of exactly this "
            "model; if its classes are not ImageNet's, also give names=FILE with all of them"
        ) from error
    settings = model.pretrained_cfg
    labels = list(settings.get("label_names") or [])
    described = settings.get("label_descriptions") or {}
    labels = [described.get(label, label) for label in labels]
    if not labels and classes is None:
        subset = infer_imagenet_subset(model)
        if subset:
            info = ImageNetInfo(subset)
            labels = [info.index_to_description(i) for i in range(info.num_classes())]
    return model, of_timm(settings), labels


def _published(cfg: Any, name: str) -> Path:
    """Return the file of timm's published weights."""
    if cfg is None or not (cfg.hf_hub_id or cfg.url):
        raise ValueError(f"timm publishes no weights for {name!r}: give weights=FILE")
    if cfg.hf_hub_id:
        file = cfg.hf_hub_filename or "model.safetensors"
        source = Source(cfg.hf_hub_id, (file,), cfg.license or "")
        return fetch(source, "classifier", "weights") / file
    return fetch_url(cfg.url, "classifier", "weights")


def of_timm(settings: Any) -> Preprocess:
    """Return the preprocessing that timm's `pretrained_cfg` specifies."""
    size = tuple(settings["input_size"][-2:])
    share = settings.get("crop_pct") or 0.875
    fit = {"squash": "squash", "border": "pad"}.get(settings.get("crop_mode"), "crop")
    return Preprocess(
        size,
        settings["mean"],
        settings["std"],
        settings.get("interpolation") or "bicubic",
        fit,
        fitted=[math.floor(side / share) for side in size],
        fill=sum(settings["mean"]) / 3,
    )


def _torchvision(
    name: str, weights: str | Path | None, classes: int | None
) -> tuple[nn.Module, Preprocess, list[str]]:
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        raise ValueError(
            f"unknown model {name!r} of torchvision: {hint(name, known)}"
            "torchvision.models.list_models() has them all"
        )
    tags = models.get_model_weights(name)
    file = None
    entry = tags.DEFAULT  # type: ignore[attr-defined]
    if weights is not None and _is_file(weights):
        file = weights
    elif weights is not None:
        if str(weights) not in tags.__members__:
            raise ValueError(
                f"unknown weights {str(weights)!r} of torchvision's {name}: "
                f"{hint(str(weights), tags.__members__)}Known: {', '.join(tags.__members__)}; or "
                "give a .pth or .safetensors file that exists"
            )
        entry = tags[str(weights)]
    if file is None:
        file = fetch_url(entry.url, "classifier", "weights")
    labels = list(entry.meta["categories"])
    options: dict[str, Any] = {"num_classes": classes or len(labels)}
    if name in {"googlenet", "inception_v3"}:  # as for their published weights
        options |= {"transform_input": True, "init_weights": False}
    model = models.get_model(name, weights=None, **options)
    put(model, file, f"torchvision's {name} with {options['num_classes']} classes")
    settings = entry.transforms()
    size = list(settings.crop_size) * (2 if len(settings.crop_size) == 1 else 1)
    fitted = list(settings.resize_size) * (2 if len(settings.resize_size) == 1 else 1)
    preprocess = Preprocess(
        size, settings.mean, settings.std, settings.interpolation.value, "crop", fitted=fitted
    )
    return model, preprocess, [] if classes is not None else labels


LIBRARIES = {"timm": _timm, "torchvision": _torchvision}
"""Name -> function that makes a network, its preprocessing and the names of its classes.

Its arguments are the model's name in the library, the tag or file of its weights, and the number
of classes; None: the library's defaults.
"""


def _is_file(weights: str | Path) -> bool:
    """Return whether a text names a file rather than a tag."""
    path = Path(weights)
    return path.exists() or path.suffix in {".pth", ".pt", ".safetensors", ".bin"}


def _short(error: Exception) -> str:
    """Return an error's message on one line of at most 300 characters."""
    return " ".join(str(error).split())[:300]
