"""Published rewards without their weights: networks of the right shapes, for plans of memory."""

import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from types import MappingProxyType
from typing import Any

from torch import Tensor

from rewards.catalogue import PLACES
from rewards.grammar import terms, written_options
from rewards.loading import load, missing
from steer.reward import Reward, wrap

__all__ = ["ARCHITECTURES", "outlined"]

ARCHITECTURES: Mapping[str, str] = MappingProxyType(
    {
        "pickscore": "ViT-H-14",
        "hpsv2": "ViT-H-14",
        "aesthetic": "ViT-L-14",
    }
)
"""Reward -> the open_clip architecture with its sizes; heads are left out."""


def outlined(spec: str, within: AbstractContextManager[Any]) -> Reward:
    """Return a reward with the cost of the one that a text names, without fetching weights.

    Rewards whose weights are in the package, or that have none, are loaded. Of the others, neither
    weights nor activations are counted if they are not in `ARCHITECTURES`: `unknown` names these.

    Args:
        spec: the text, as `rewards.load` takes it.
        within: the mode in which networks are made, without values.

    Raises:
        ValueError: the text cannot be parsed, or names no reward.
    """
    total: Reward | None = None
    unknown: list[str] = []
    for weight, text in terms(spec):
        one = _one(text, within, unknown)
        total = weight * one if total is None else total + weight * one
    assert total is not None
    total.unknown = unknown  # type: ignore[assignment]
    total.__name__ = spec  # type: ignore[assignment]
    return total


def _one(text: str, within: AbstractContextManager[Any], unknown: list[str]) -> Reward:
    name, _, written = text.partition(":")
    name = name.strip()
    architecture = ARCHITECTURES.get(name)
    if name == "clip":
        options = written_options(written, name)
        model = str(options.get("model", ""))
        architecture = model if re.fullmatch(r"[\w-]+", model) else None
    if architecture is not None:
        return _tower(architecture, within)
    used = [one for one in re.findall(r"\w+", text) if one in PLACES]
    lacking = [one for one in used if missing(one) or one == "remote"]
    if lacking:
        unknown += lacking
        return wrap(_mean)
    return load(text)


def _mean(images: Tensor) -> Tensor:
    return images.mean((1, 2, 3))


def _tower(architecture: str, within: AbstractContextManager[Any]) -> Reward:
    import open_clip
    from open_clip.model import CLIP
    from open_clip.transform import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    from rewards.models.cosine import Cosine
    from rewards.models.preprocess import Preprocess
    from rewards.models.towers import OpenClip

    config = open_clip.get_model_config(architecture)
    if config is None or "custom_text" in config or "timm_model_name" in config["vision_cfg"]:
        raise ValueError(
            f"no plan for the open_clip architecture {architecture!r}: sizes are known of those "
            "with towers of open_clip's own, ViT-B-32, ViT-L-14, ViT-H-14 and the like"
        )
    with within:
        model = CLIP(**config)
    preprocess = Preprocess(
        model.visual.image_size, OPENAI_DATASET_MEAN, OPENAI_DATASET_STD, fit="pad"
    )
    return Cosine(OpenClip(model, open_clip.get_tokenizer("ViT-B-32"), preprocess))
