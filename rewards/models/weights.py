"""Load published weights into modules, none missing and none left over, and read their names."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from steer.reward import reason

__all__ = ["collapsed", "count", "fill", "pretrained", "refuse_lacking"]


def fill(model: nn.Module, weights: Mapping[str, Tensor], where: str | Path, reward: str) -> None:
    """Load weights into a module: none missing, none left over.

    Args:
        model: the module.
        weights: the weights, by the names of its `state_dict`.
        where: where they come from, for the message.
        reward: the reward's name, for the message.

    Raises:
        ValueError: they have another layout; the message has the first keys.
    """
    own = model.state_dict()
    _refuse_misfits(
        missing=[k for k in own if k not in weights],
        unexpected=[k for k in weights if k not in own],
        shapes=[
            (k, tuple(weights[k].shape), tuple(own[k].shape))
            for k in own
            if k in weights and weights[k].shape != own[k].shape
        ],
        where=where,
        reward=reward,
    )
    model.load_state_dict(dict(weights))


def pretrained(kind: Any, folder: str | Path, reward: str) -> Any:
    """Return a model of transformers with a folder's weights: none missing, none left over.

    Args:
        kind: the model's class.
        folder: holds config.json and model.safetensors.
        reward: whose it is, for the message.

    Raises:
        ValueError: it cannot be read, or is of another layout; the message has the first keys.
    """
    try:
        model, info = kind.from_pretrained(
            str(folder),
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except Exception as error:
        raise ValueError(
            f"cannot load the {kind.__name__} in {str(folder)!r} for {reward!r} "
            f"({type(error).__name__}: {reason(error)}). It must hold config.json and "
            "model.safetensors, as the model's page has them"
        ) from error
    _refuse_misfits(
        missing=sorted(info["missing_keys"]),
        unexpected=sorted(info["unexpected_keys"]),
        shapes=[(k, tuple(a), tuple(b)) for k, a, b in sorted(info["mismatched_keys"])],
        where=folder,
        reward=reward,
    )
    return model


def _refuse_misfits(
    missing: list[str],
    unexpected: list[str],
    shapes: list[tuple[str, tuple[int, ...], tuple[int, ...]]],
    where: str | Path,
    reward: str,
) -> None:
    """Raise an error if any list is not empty; name the first three entries of each."""
    found = []
    for title, keys in (("missing", missing), ("not expected", unexpected)):
        if keys:
            found.append(f"{title} {len(keys)}: {', '.join(keys[:3])}")
    if shapes:
        sizes = ", ".join(f"{k} {a} for {b}" for k, a, b in shapes[:3])
        found.append(f"of another shape {len(shapes)}: {sizes}")
    if found:
        raise ValueError(
            f"the weights in {str(where)!r} are of another layout than {reward!r} expects "
            f"({'; '.join(found)}). Give the file that its page publishes, unchanged"
        )


def refuse_lacking(lacking: Iterable[str], model: nn.Module, folder: str | Path) -> None:
    """Refuse a model of transformers that was loaded without some of its weights.

    Args:
        lacking: the names of the weights that were not found.
        model: the loaded model.
        folder: the folder that it was loaded from, for the message.

    Raises:
        ValueError: some weights are missing; the message has the first.
    """
    names = sorted(lacking)
    if names:
        raise ValueError(
            f"the files in {str(folder)!r} lack {len(names)} weights of "
            f"{type(model).__name__} ({names[0]} and so on): give those that its page "
            "publishes, unchanged"
        )


def count(weights: Mapping[str, Tensor], prefix: str) -> int:
    """Count the numbered parts, such as layers, whose names start with a prefix.

    >>> count({"layers.0.w": torch.ones(1), "layers.1.w": torch.ones(1)}, "layers.")
    2
    """
    return len({key.split(".")[prefix.count(".")] for key in weights if key.startswith(prefix)})


def collapsed(weights: Mapping[str, Tensor], prefix: str) -> tuple[Tensor, Tensor]:
    """Collapse a chain of linear layers into its affine map (W (m, d), b (m,)), in float64.

    Args:
        weights: `{prefix}{i}.weight` and `{prefix}{i}.bias` of each layer; applied by rising i.
        prefix: what the keys begin with.

    Raises:
        ValueError: a bias is missing, or the layers' widths do not match.
    """
    found = (re.fullmatch(rf"{re.escape(prefix)}(\d+)\.weight", key) for key in weights)
    numbers = sorted(int(match[1]) for match in found if match)
    weight, bias = torch.empty(0, 0), torch.empty(0)
    for i in numbers:
        w, b = weights[f"{prefix}{i}.weight"].double(), weights.get(f"{prefix}{i}.bias")
        if b is None or (len(weight) and w.shape[1] != len(weight)):
            raise ValueError(
                f"the layer {prefix}{i} of weight {tuple(w.shape)} "
                + ("has no bias" if b is None else f"does not take the {len(weight)} before it")
                + ": give the file as it is published"
            )
        first = not len(weight)
        weight = w if first else w @ weight
        bias = b.double() if first else w @ bias + b.double()
    return weight, bias
