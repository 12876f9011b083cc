"""A network's folder: `config.json` and `model.safetensors`."""

import json
import os
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from steer.catalogue import MODELS
from steer.files import write_atomically
from steer.models.two_time import TwoTimeUNet
from steer.names import hint

__all__ = ["ZOO", "folder_of", "read_network", "write_network"]

ZOO = Path(__file__).parents[1] / "zoo"
"""The folder of the embedded models."""


def read_network(folder: Path, kind: type[TwoTimeUNet], form: str) -> Any:
    """Read a network from `config.json` and `model.safetensors`, in float32.

    Args:
        folder: holds both.
        kind: the network's class.
        form: the "format" that config.json must name.

    Raises:
        FileNotFoundError: one of them is missing.
        ValueError: one of them is not what it should be, or they do not fit each other.
    """
    config = _read_config(folder / "config.json", form)
    try:
        with torch.device("meta"):  # allocate nothing before the weights are known to fit
            network = kind(**config)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{folder / 'config.json'} is not a model's configuration ({_short(error)}): take it "
            "and model.safetensors from the same save"
        ) from None
    state = _read_weights(folder / "model.safetensors")
    try:
        # copies, because a file's tensors may be unaligned, and rounding in kernels depends on
        # alignment
        whole = {k: v.to(torch.float32, copy=True) for k, v in state.items()}
        network.load_state_dict(whole, assign=True)
    except RuntimeError as error:
        raise ValueError(
            f"{folder / 'model.safetensors'} does not fit config.json beside it: {_short(error)}\n"
            "take both files from the same save"
        ) from None
    return network


def write_network(network: TwoTimeUNet, folder: Path, form: str, dtype: torch.dtype) -> None:
    """Write the two files that `read_network` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {k: v.detach().to("cpu", dtype).contiguous() for k, v in network.state_dict().items()}
    text = json.dumps({"format": form, **network.config}, ensure_ascii=False, indent=1)
    write_atomically(folder / "model.safetensors", safetensors.torch.save(state))
    write_atomically(folder / "config.json", text.encode())


def folder_of(name: str | os.PathLike[str]) -> Path:
    """Return the folder of an embedded model, or of one of your own.

    Raises:
        ValueError: there is neither; the message lists the existing ones.
    """
    text = os.fspath(name)
    if text in MODELS:
        return ZOO / text
    folder = Path(text)
    if not folder.exists():
        raise ValueError(
            f"no model named {text!r}, and no such folder: {hint(text, MODELS)}"
            f"the models are {', '.join(MODELS)}; or give a folder with config.json and "
            "model.safetensors, file.py:Name, or a diffusers pipeline by its folder or hub id "
            "(owner/name)"
        )
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file: give the folder that holds it and config.json")
    return folder


def _present(file: Path) -> Path:
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} is missing: a model's folder holds config.json and model.safetensors; "
            "copy it again, or reinstall the package if the model is an embedded one"
        )
    return file


def _read_config(file: Path, form: str) -> dict[str, Any]:
    try:
        config = dict(json.loads(_present(file).read_text(encoding="utf-8")))
        found = config.pop("format")
    except (ValueError, TypeError, KeyError, RecursionError):
        raise ValueError(
            f"{file} is not a model's configuration: copy it again, or train with `steer train`"
        ) from None
    if found != form:
        raise ValueError(f"{file} has format {repr(found)[:60]}; expected {form!r}")
    return config


def _short(error: Exception) -> str:
    """Return the message of an error about an untrusted file, on one readable line."""
    return " ".join(str(error).split())[:300]


def _read_weights(file: Path) -> dict[str, torch.Tensor]:
    try:
        return safetensors.torch.load_file(_present(file))
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{file} is truncated or corrupt ({error}): copy it again, or reinstall the package "
            "if the model is an embedded one"
        ) from None
