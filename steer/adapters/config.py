"""Read a LoRA's configuration, which is untrusted: only known keys, within bounds."""

import json
import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from steer.adapters.targets import ends, plain_name

__all__ = ["about", "narrowed", "plain_config", "rank_of", "scaling_of", "understood"]

RANKS = 4096
"""The largest rank."""

NAMES, LENGTH = 10_000, 512
"""Maximum number of names of layers in a list, and of characters in a name."""

MORE = (
    "alora_invocation_tokens", "arrow_config", "bias", "ensure_weight_tying", "kasa_config",
    "layer_replication", "lora_bias", "modules_to_save", "monteclora_config", "target_parameters",
    "trainable_token_indices", "use_bdlora", "use_dora", "use_qalora", "velora_config",
)  # fmt: skip
"""Settings under which a LoRA is more than `W x + alpha / r B A x`."""

MOVING = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations of a LoRA that change the base's weights."""


def understood(found: Mapping[str, Any], file: object) -> dict[str, Any]:
    """Return the known entries of a configuration, checked; all others are ignored.

    Names of layers are literal: a layer's name, or its end after a dot; in `rank_pattern` and
    `alpha_pattern` a name after "^" is a layer's whole name. The initialisation of the LoRA is
    irrelevant when it is read, and is left out.

    Args:
        found: the content of the file.
        file: name of the file for error messages.

    Raises:
        ValueError: a value of the wrong type or out of bounds; a setting with which the LoRA is
            more than the plain update.
    """
    if found.get("peft_type") != "LORA":
        raise ValueError(
            f"{file} is not the configuration of a LoRA: its peft_type is "
            f"{_short(found.get('peft_type'))}"
        )
    more = [k for k in MORE if found.get(k) not in (None, False, "none", [], {})]
    if more:
        raise ValueError(
            f"{file} sets {', '.join(more)}: only the plain update B A x can be scaled to zero, "
            "so train without"
        )
    how = found.get("init_lora_weights")
    if isinstance(how, str) and how.lower().startswith(MOVING):
        warnings.warn(
            f"{file} was initialised with {_short(how)}, which changes the base's weights; here "
            "they are not changed, so convert it with peft "
            "(path_initial_model_for_weight_conversion), or the pictures differ from those of the "
            "tuned model",
            stacklevel=3,
        )

    def take(key: str, default: Any, fits: Callable[[Any], bool], expected: str) -> Any:
        value = default if found.get(key) is None else found[key]
        if not fits(value):
            raise ValueError(f"{file}: {key} must be {expected}, got {_short(value)}")
        return value

    names = f"a list of at most {NAMES} names of layers, without patterns"
    patterns = f"at most {NAMES} names of layers, each with "
    base = found.get("base_model_name_or_path")
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base if isinstance(base, str) else None,
        "inference_mode": True,
        "r": take("r", 8, _rank, f"a whole number from 1 to {RANKS}"),
        "lora_alpha": take("lora_alpha", 8, _number, "a finite number"),
        "target_modules": take("target_modules", [], _names, names),
        "exclude_modules": take("exclude_modules", [], _names, names) or None,
        "layers_to_transform": take(
            "layers_to_transform", [], _layers, f"at most {NAMES} numbers of layers"
        )
        or None,
        "layers_pattern": take("layers_pattern", [], _names, names) or None,
        "lora_dropout": take("lora_dropout", 0.0, _share, "a fraction from 0 to 1"),
        "bias": "none",
        "use_rslora": take("use_rslora", False, lambda v: isinstance(v, bool), "true or false"),
        "rank_pattern": take("rank_pattern", {}, _pattern(_rank), f"{patterns}its rank"),
        "alpha_pattern": take("alpha_pattern", {}, _pattern(_number), f"{patterns}its alpha"),
        "init_lora_weights": True,
    }


def narrowed(config: Mapping[str, Any]) -> bool:
    """Return whether only some of the layers that a configuration names have adapters."""
    return bool(config["exclude_modules"] or config["layers_to_transform"])


def about(config: Mapping[str, Any], layers: Iterable[str]) -> dict[str, Any]:
    """Return a configuration without names that match none of these layers.

    peft tries every name at every layer: a file with thousands of names would take minutes.
    """
    called = {end for layer in layers for end in ends(layer)}
    patterns = {
        key: {name: v for name, v in config[key].items() if name.removeprefix("^") in called}
        for key in ("rank_pattern", "alpha_pattern")
    }
    known = [name for name in config["target_modules"] if name in called]
    return {**config, "target_modules": known, **patterns}


def rank_of(config: Mapping[str, Any], layer: str) -> int:
    """Return the rank of a layer's adapters.

    >>> rank_of({"r": 2, "rank_pattern": {"^up.conv": 4, "out": 8}}, "up.conv")
    4
    """
    return _of_layer(config["rank_pattern"], layer, config["r"])


def scaling_of(config: Mapping[str, Any], layer: str, rank: int) -> float:
    """Return the factor of the update B A of a layer's adapters at scale 1.

    >>> scaling_of({"lora_alpha": 6, "alpha_pattern": {}, "use_rslora": False}, "out", 2)
    3.0
    """
    alpha = _of_layer(config["alpha_pattern"], layer, config["lora_alpha"])
    return alpha / (rank**0.5 if config["use_rslora"] else rank)


def _of_layer(patterns: Mapping[str, Any], layer: str, default: Any) -> Any:
    layer = plain_name(layer)
    for name, value in patterns.items():
        whole = name.removeprefix("^")
        if layer == whole or (whole == name and layer.endswith(f".{whole}")):
            return value
    return default


def plain_config(config: Mapping[str, Any]) -> bytes:
    """Return peft's configuration as JSON, sets as sorted lists."""
    plain = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
    return json.dumps(plain, indent=1, default=str).encode()


def _number(value: Any) -> bool:
    try:
        return isinstance(value, int | float) and type(value) is not bool and math.isfinite(value)
    except OverflowError:  # an integer, not a float
        return False


def _rank(value: Any) -> bool:
    return type(value) is int and 1 <= value <= RANKS


def _share(value: Any) -> bool:
    return _number(value) and 0 <= value < 1


def _layers(value: Any) -> bool:
    numbers = value if isinstance(value, list) else [value]
    return len(numbers) <= NAMES and all(type(v) is int and 0 <= v <= NAMES for v in numbers)


def _name(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= LENGTH


def _names(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= NAMES and all(map(_name, value))


def _pattern(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Return a check of name -> value; peft reads names as patterns, so only plain ones pass."""

    def check(value: Any) -> bool:
        return (
            isinstance(value, dict)
            and len(value) <= NAMES
            and all(
                _name(name) and re.fullmatch(r"\^?[\w.-]+", name) and fits(v)
                for name, v in value.items()
            )
        )

    return check


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
