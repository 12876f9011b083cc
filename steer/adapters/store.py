"""Adapters in a folder: peft's two files, with metadata on the adapters and their base."""

import json
import os
import re
import warnings
from collections.abc import Collection, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from steer.adapters.config import about, narrowed, plain_config, rank_of, understood
from steer.adapters.fingerprint import fingerprint
from steer.adapters.inject import inject, refuse_adapted
from steer.adapters.lora import DEFAULT, Adapted
from steer.adapters.shared import SHARED, shared_file
from steer.adapters.targets import matches, name_of_denoiser, plain_name, targets
from steer.files import pack, read_notes, write_atomically
from steer.flow import FlowMap

__all__ = [
    "BESIDE",
    "CONFIG",
    "PREFIX",
    "WEIGHTS",
    "check_base",
    "load_adapters",
    "read_config",
    "read_metadata",
    "read_weights",
    "save_adapters",
]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

PREFIX = "base_model.model."
"""peft's prefix of the names of parameters in its files."""

BESIDE = "second_time."
"""Prefix of the names of tensors that are stored in addition to the adapters."""

LARGEST = 1 << 24
"""Maximum size of a configuration, in bytes."""


def save_adapters(
    tuned: Adapted,
    folder: str | os.PathLike[str],
    metadata: Mapping[str, Any] | None = None,
    beside: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a folder that `steer.load(base, lora=folder)` and peft read: adapters alone.

    Those of a diffusers pipeline are also written for `pipe.load_lora_weights(folder)`. The file's
    metadata contain the name of its base, the hash of the base's weights, and the versions of the
    software that wrote it. Each file is written atomically.

    Args:
        tuned: the flow; the adapters of its view are written.
        folder: created if it is missing.
        metadata: more to keep in the file: JSON values.
        beside: more tensors to keep in the file; peft does not see them.
    """
    import steer

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {f"{PREFIX}{plain_name(name)}": p for name, p in _state(tuned).items()}
    notes = {
        "base": tuned.name,
        **tuned.about,
        "flowsteer": steer.__version__,
        "versions": {name: version(name) for name in ("torch", "peft")},
        **(metadata or {}),
    }
    if "base_sha256" not in notes:
        notes["base_sha256"] = fingerprint(tuned)
    config = tuned.configs[tuned.adapter].to_dict()
    config["inference_mode"] = True
    for key in ("target_modules", "exclude_modules"):
        config[key] = sorted(map(plain_name, config[key])) if config[key] else None
    if tuned.component:
        inside = name_of_denoiser(tuned.flow)
        plain = {name.removeprefix(PREFIX): p for name, p in state.items()}
        known = understood(config, "these")
        shared = shared_file(known, plain, tuned.component, inside, notes=notes)
        write_atomically(folder / SHARED, shared)
    write_atomically(folder / WEIGHTS, pack({**state, **(beside or {})}, notes))
    write_atomically(folder / CONFIG, plain_config(config))


def _state(tuned: Adapted) -> dict[str, Tensor]:
    """Return the view's adapters by their names in peft's files, without its prefix.

    peft's own function omits layers whose names contain the name of other adapters.
    """
    own = re.compile(rf"(\.lora_\w+)\.{re.escape(tuned.adapter)}(?=\.|$)")
    return {own.sub(r"\1", name): p for name, p in tuned.adapters().items()}


def read_metadata(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the metadata of a folder of adapters; there are only a few entries if peft wrote it.

    Raises:
        FileNotFoundError: it has no file of adapters.
        ValueError: that file is truncated.
    """
    return read_notes(_present(Path(folder) / WEIGHTS))


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the known entries of peft's configuration in a folder of adapters.

    Raises:
        FileNotFoundError: there is no configuration.
        ValueError: it is not the configuration of a LoRA, has more than A and B, or has values out
            of bounds.
    """
    file = _present(Path(folder) / CONFIG)
    if file.stat().st_size > LARGEST:
        raise ValueError(
            f"{file} is not the configuration of a LoRA: it is larger than {LARGEST} bytes"
        )
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not the configuration of a LoRA: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(
            f"{file} is not the configuration of a LoRA: it is not a table of settings"
        )
    return understood(found, file)


def read_weights(folder: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return the tensors of a folder of adapters, by their names in the flow.

    Raises:
        FileNotFoundError: it has no file of adapters.
        ValueError: a number in it is not finite, as in a damaged file.
    """
    file = _present(Path(folder) / WEIGHTS)
    state = safetensors.torch.load_file(file)
    bad = [name for name, p in state.items() if not bool(p.isfinite().all())]
    if bad:
        raise ValueError(
            f"{file} has numbers that are not finite in {bad[0]!r}: it is damaged, or its "
            "training diverged; take another copy or an earlier checkpoint"
        )
    return {
        name.removeprefix(PREFIX): p for name, p in state.items() if not name.startswith(BESIDE)
    }


def load_adapters(
    flow: FlowMap, folder: str | os.PathLike[str], scale: float = 1.0, *, check: bool = True
) -> Adapted:
    """Put the adapters of a folder on a flow's denoiser.

    Args:
        flow: the base that they were made for.
        folder: what `save_adapters` or peft wrote.
        scale: factor for their update; 0 is the base.
        check: refuse adapters that were made for other weights.

    Raises:
        FileNotFoundError: the folder lacks one of its two files.
        ValueError: the adapters are for another base, do not fit it, or are not whole; the flow
            has adapters already.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no folder of adapters at {folder}: give the one that holds {CONFIG} and {WEIGHTS}"
        )
    notes = read_metadata(folder)
    if check:
        check_base(flow, notes, folder)
    config, state = read_config(folder), read_weights(folder)
    refuse_adapted(flow)
    found, wanted = targets(flow), frozenset(config["target_modules"])
    theirs = {name.rpartition(".lora_")[0] for name in state}
    some = narrowed(config)
    named = [n for n in found.inside if matches(n, wanted)]
    names = [n for n in named if plain_name(n) in theirs or not some]
    if not names:
        raise ValueError(
            f"the adapters in {folder} do not fit this base: its denoiser has no layer named "
            f"{', '.join(sorted(wanted)[:8]) or 'in target_modules'}"
        )
    config = about(config, names)
    layers = set(map(plain_name, names))
    a = {n: state[f"{n}.lora_A.weight"] for n in layers if f"{n}.lora_A.weight" in state}
    # before anything is allocated with its sizes
    wrong = [f"{n}.lora_A.weight" for n, p in a.items() if p.shape[:1] != (rank_of(config, n),)]
    _refuse_misfit(folder, layers - theirs, theirs - layers, wrong)

    from peft import LoraConfig, set_peft_model_state_dict  # takes seconds, so only when needed

    known = LoraConfig.__dataclass_fields__
    options = {k: v for k, v in config.items() if k in known and k != "peft_type"}
    try:
        tuned = inject(flow, LoraConfig(**options), names, found.beside)
    except (ValueError, TypeError) as error:
        raise ValueError(f"the adapters in {folder} do not fit this base: {error}") from None
    here = _state(tuned)
    own, name_here = {plain_name(n): p for n, p in here.items()}, {plain_name(n): n for n in here}
    wrong = [n for n in own.keys() & state.keys() if own[n].shape != state[n].shape]
    _refuse_misfit(folder, own.keys() - state.keys(), state.keys() - own.keys(), wrong)
    set_peft_model_state_dict(
        tuned.switch.flow, {name_here[n]: p for n, p in state.items()}, DEFAULT
    )
    return tuned.at(scale)


def check_base(flow: FlowMap, notes: Mapping[str, Any], folder: Path) -> None:
    """Refuse adapters that were made for other weights; warn if their base is unknown."""
    theirs, own = notes.get("base_sha256"), fingerprint(flow)
    if theirs is None:
        warnings.warn(
            f"{folder} does not say for which weights its adapters were made, so it cannot be "
            "checked that they fit this base",
            stacklevel=3,
        )
    elif theirs != own:
        raise ValueError(
            f"the adapters in {folder} were made for {notes.get('base') or 'another base'!r} with "
            f"weights {str(theirs)[:12]}, and this is {flow.name or type(flow).__name__!r} with "
            f"weights {own[:12]}: load the base that they were made for, or tune again on this one"
        )


def _refuse_misfit(
    folder: Path, missing: Collection[str], unknown: Collection[str], wrong: Collection[str]
) -> None:
    """Raise an error if names or shapes of a file's adapters do not match the flow."""
    if missing or unknown or wrong:
        example = min([*unknown, *missing, *wrong])
        raise ValueError(
            f"the adapters in {folder} do not fit this base: {len(unknown)} belong to layers that "
            f"its denoiser does not have, {len(missing)} of its own are missing, {len(wrong)} "
            f"have another shape (for instance {example}): they were made for another model, or "
            f"the file and {CONFIG} are not from the same save"
        )


def _present(file: Path) -> Path:
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} is missing: a folder of adapters holds {CONFIG} and {WEIGHTS}"
        )
    return file
