"""Inputs of commands: models, prompts and pictures, read in the same way for all commands."""

import json
import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torchvision.transforms.functional import to_tensor

import steer
from steer.adapters.compiling import compile_blocks
from steer.adapters.fingerprint import fingerprint
from steer.adapters.store import load_adapters
from steer.devices import usable_device
from steer.hub import lora_path

__all__ = [
    "Asked",
    "Dtype",
    "asked_for",
    "file_or_list",
    "load_model",
    "model_name",
    "read_picture",
    "read_prompts",
    "takes_prompts",
    "weights_of",
]

Dtype = Literal["float32", "bfloat16", "float16", "float64"]

# ------------------------------------------------------------------ models


def model_name(model: Any) -> str:
    """Return a model's name for files and messages: its text, or the name of a live model."""
    if isinstance(model, str | os.PathLike):
        return os.fspath(model)
    config = dict(getattr(model, "config", None) or {})
    name = model.name if isinstance(model, steer.FlowMap) else config.get("_name_or_path")
    return str(name or f"a live {type(model).__name__}")


def weights_of(model: Any, flow: steer.FlowMap) -> dict[str, str]:
    """Return name -> hash of a live model's weights; empty for a model that is given by name."""
    if isinstance(model, str | os.PathLike):
        return {}
    return {model_name(model): fingerprint(flow)}


def load_model(
    model: Any,
    device: str | None = None,
    dtype: Dtype | None = None,
    lora: Path | None = None,
    lora_scale: float | None = None,
    options: Mapping[str, Any] | None = None,
    compile: bool | str = False,
) -> steer.FlowMap:
    """Load a model by its name, folder, hub id or file.py:Name, and adapters on it.

    Args:
        model: its text; in Python also a flow map or a pipeline object, which is used unchanged.
        device: device of the model.
        dtype: dtype of its weights.
        lora: adapters to put on it.
        lora_scale: factor for their update.
        options: options of a pipeline, see `steer.load`.
        compile: see `steer.load`.

    Raises:
        ValueError: a scale without adapters, or a device or name that does not exist.
        TypeError: the object in the file is not a flow map.
    """
    kind = None if dtype is None else getattr(torch, dtype)
    if lora is None and lora_scale is not None:
        raise ValueError(
            "lora_scale needs adapters: give --lora FOLDER, or leave --lora-scale out"
        )
    usable_device(device)
    scale = 1.0 if lora_scale is None else lora_scale
    options = dict(options or {})
    if isinstance(model, steer.FlowMap) and not options:
        flow = model if device is None and kind is None else model.to(device=device, dtype=kind)
        if compile:
            compile_blocks(flow, compile)
        return flow if lora is None else load_adapters(flow, lora_path(lora), scale)
    return steer.load(model, lora, scale, device, kind, compile=compile, **options)


def takes_prompts(flow: steer.FlowMap) -> bool:
    """Return whether a flow can be bound to prompts."""
    return flow.given([""]) is not flow


# ------------------------------------------------------------------ prompts


class Asked(NamedTuple):
    """Prompts, and the reward's prompt for each if the file has them."""

    prompts: list[str]
    reward_prompts: list[str] | None

    @property
    def questions(self) -> list[str]:
        """The prompts for the reward."""
        return self.prompts if self.reward_prompts is None else self.reward_prompts

    def part(self, start: int, end: int) -> "Asked":
        """Return a slice of the prompts."""
        texts = self.reward_prompts
        return Asked(self.prompts[start:end], None if texts is None else texts[start:end])


def read_prompts(file: Path) -> Asked:
    """Read a file of prompts, UTF-8; blank lines are skipped.

    A `.jsonl` file has one object per line: "prompt" (or "text"), and "reward_prompt" if the
    reward has another prompt; other keys are ignored. Any other file has one prompt per line.
    Lines end with a line feed, a carriage return or both; Unicode separators do not end a line.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it has no prompts, or an invalid line; the message names the line.
    """
    file = file.expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"no prompts file at {file.absolute()}: give a text or jsonl file")
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 ({error.reason}): save it as UTF-8") from None
    found = [(f"{file}, line {i + 1}", line) for i, line in enumerate(lines) if line.strip()]
    if not found:
        raise ValueError(f"{file} has no prompts: write one per line")
    if file.suffix.lower() != ".jsonl":
        if re.match(r"\s*\{\s*\"", found[0][1]):
            raise ValueError(
                f"{found[0][0]}: {found[0][1].strip()[:60]!r} looks like JSON: name the file "
                "something.jsonl, with one object per line, or put plain prompts in it"
            )
        return Asked([_plain(line, where).strip() for where, line in found], None)
    entries = [_entry(line, where) for where, line in found]
    prompts, asked = [prompt for prompt, _ in entries], [question for _, question in entries]
    return Asked(prompts, asked if asked != prompts else None)


def _entry(line: str, where: str) -> tuple[str, str]:
    """Return the prompt of a line of JSON, and the reward's prompt."""
    try:
        entry = json.loads(line)
        prompt = entry["prompt"] if "prompt" in entry else entry["text"]
        question = entry.get("reward_prompt", prompt)
        if not (isinstance(prompt, str) and isinstance(question, str)):
            raise TypeError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(
            f'{where}: {line.strip()[:60]!r} is not an object with a "prompt": write '
            '{"prompt": "a red apple"} on each line'
        ) from None
    return _plain(prompt, where), _plain(question, where)


def _listed(prompts: Sequence[str]) -> Asked:
    """Return prompts that are given literally, in the command or in its YAML."""
    if not prompts:
        raise ValueError("the list of prompts is empty: give at least one, or leave it out")
    return Asked([_plain(text, f"prompt {i + 1}") for i, text in enumerate(prompts)], None)


def asked_for(prompts: str | Sequence[str] | None, file: Path | None = None) -> Asked | None:
    """Return the prompts of a command with one option for texts, and another one for a file.

    Raises:
        ValueError: both options, an empty list, or the name of a file instead of a text.
        FileNotFoundError: there is no such file.
    """
    if prompts is not None and file is not None:
        raise ValueError("prompt and prompts_file both given: give one of them")
    if file is not None:
        return read_prompts(file)
    if prompts is None:
        return None
    if not isinstance(prompts, str):
        return _listed(prompts)
    if Path(prompts).suffix.lower() in {".txt", ".jsonl"} and os.path.isfile(prompts):
        raise ValueError(f"the prompt {prompts!r} is a file: give it as --prompts-file {prompts}")
    return _listed([prompts])


def file_or_list(prompts: str | Sequence[str] | None) -> Asked | None:
    """Return the prompts of a command with a single option, which takes a file or a list.

    Raises:
        ValueError: the list is empty.
        FileNotFoundError: there is no such file.
    """
    if prompts is None:
        return None
    return read_prompts(Path(prompts)) if isinstance(prompts, str) else _listed(prompts)


def _plain(text: str, where: str) -> str:
    """Return a text without line breaks and tabs; refuse other control characters."""
    text = re.sub(r"[\t\n\v\f\r\x85\u2028\u2029]+", " ", text)
    for letter in text:
        if unicodedata.category(letter) in {"Cc", "Cs"} or letter in _TURNS:
            raise ValueError(
                f"{where} holds the control character U+{ord(letter):04X}, which terminals and "
                "web pages would interpret: remove it"
            )
    return text


_TURNS = {chr(i) for i in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}
"""Characters that change the direction of the following text."""

# ------------------------------------------------------------------ pictures


def read_picture(file: Path, size: Sequence[int], option: str) -> Tensor:
    """Read a picture on white, cropped to the middle and resized -> (3, h, w) in [0, 1].

    Args:
        file: the picture, which is rotated according to its EXIF data.
        size: (h, w).
        option: the option that named the file, for the messages.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not a picture with 8 bits per channel or 16 bits of grey; the message
            says what to give.
    """
    from PIL import Image, ImageOps

    from rewards.pixels.reading import read
    from steer.pictures import to_pil

    picture = to_pil(read(file, option)[0])
    return to_tensor(ImageOps.fit(picture, (size[1], size[0]), Image.Resampling.BICUBIC))
