"""Low-rank adapters (LoRA) on a flow map: one network that is both the base and the tuned flow.

Every adapted layer computes `W x + scale alpha / r B A x` (Hu et al. 2021, arXiv 2106.09685), with
B zero at first: at step 0, and at scale 0 always, the tuned flow is the base bit for bit. There is
no second copy of the network. peft does the layers; `import steer` does not load it.
"""

import hashlib
import json
import os
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from steer.adapters.lora import DEFAULT, Adapted, _inject, _plain, _refuse_adapted
from steer.flow import FlowMap

__all__ = [
    "fingerprint",
    "load_adapters",
    "pack",
    "plain_config",
    "read_config",
    "read_metadata",
    "save_adapters",
]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

PREFIX = "base_model.model."

"""What peft puts before the names of the parameters in its files."""


def fingerprint(flow: FlowMap) -> str:
    """Return a hash of a flow's weights, its adapters left out, rounded to bfloat16.

    So it is the same in float32 and in bfloat16, on any device.
    """
    inner = flow.flow if isinstance(flow, Adapted) else flow
    digest = hashlib.sha256()
    named = {name.replace("base_layer.", ""): p for name, p in inner.state_dict().items()}
    for name in sorted(named):  # the order of the base's own names
        if "lora_" in name:
            continue
        p = named[name]
        digest.update(f"{name} {tuple(p.shape)}".encode())
        values = p.detach().to("cpu")
        if values.is_floating_point():
            values = values.to(torch.bfloat16).view(torch.int16)
        digest.update(values.contiguous().numpy().tobytes())
    return digest.hexdigest()


def save_adapters(
    tuned: Adapted, folder: str | os.PathLike[str], metadata: dict[str, Any] | None = None
) -> None:
    """Write a folder that `steer.load(base, lora=folder)` and peft read: adapters alone.

    The file's metadata say which base it is for: its name and the hash of its weights, and the
    versions of what wrote it. Each file appears whole or not at all.

    Args:
        tuned: the flow; the adapters of its view are written.
        folder: made where it is missing.
        metadata: more to keep in the file: JSON values.
    """
    import steer
    from steer.files import write_atomically

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        f"{PREFIX}{_plain(name, tuned.adapter)}": p.detach().to("cpu").contiguous()
        for name, p in tuned.adapters().items()
    }
    notes = {
        "base": tuned.name,
        "flowsteer": steer.__version__,
        "versions": {name: version(name) for name in ("torch", "peft")},
        **(metadata or {}),
    }
    if "base_sha256" not in notes:
        notes["base_sha256"] = fingerprint(tuned)
    config = tuned.flow.peft_config[tuned.adapter].to_dict()  # type: ignore[index,union-attr]
    config["inference_mode"] = True
    write_atomically(folder / WEIGHTS, pack(state, notes))
    write_atomically(folder / CONFIG, plain_config(config))


def pack(state: dict[str, Tensor], notes: dict[str, Any]) -> bytes:
    """Return a safetensors file: tensors, and notes (JSON values) that `read_metadata` reads."""
    texts = {"format": "pt"}
    for name, value in notes.items():
        own = isinstance(value, str) and _parsed(value) is value
        texts[name] = value if own else json.dumps(value, ensure_ascii=False)
    return safetensors.torch.save(state, texts)


def plain_config(config: dict[str, Any]) -> bytes:
    """Return peft's configuration as JSON, sets as sorted lists."""
    plain = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
    return json.dumps(plain, indent=1, default=str).encode()


def _parsed(text: str) -> Any:
    """Return what a text is as JSON, and itself where it is none."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def read_metadata(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what a folder of adapters says of itself: little where peft alone wrote it.

    Raises:
        FileNotFoundError: it has no file of adapters.
        ValueError: that file is truncated.
    """
    try:
        with safetensors.safe_open(_present(Path(folder) / WEIGHTS), "pt") as file:
            texts = file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{Path(folder) / WEIGHTS} is truncated or corrupt ({error}): copy it again"
        ) from None
    return {name: _parsed(text) for name, text in texts.items()}


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Return peft's configuration of a folder of adapters.

    Raises:
        FileNotFoundError: it has none.
        ValueError: it is no configuration of a LoRA, or of a kind that has more than A and B.
    """
    file = _present(Path(folder) / CONFIG)
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        kind = found.get("peft_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file} is no LoRA's configuration: {error}") from None
    if kind != "LORA":
        raise ValueError(f"{file} is no LoRA's configuration: its peft_type is {kind!r}")
    more = [k for k in ("use_dora", "modules_to_save", "lora_bias") if found.get(k)]
    more += ["bias"] if found.get("bias", "none") != "none" else []
    if more:
        raise ValueError(
            f"{file} sets {', '.join(more)}: only the plain update B A x can be scaled to zero, "
            "so train without"
        )
    return found


def load_adapters(
    flow: FlowMap, folder: str | os.PathLike[str], scale: float = 1.0, *, check: bool = True
) -> Adapted:
    """Put the adapters of a folder on a flow.

    Args:
        flow: the base that they were made for.
        folder: what `save_adapters` or peft wrote.
        scale: what their update is multiplied by: 0 is the base.
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
    theirs, own = notes.get("base_sha256"), fingerprint(flow) if check else None
    if check and theirs is None:
        warnings.warn(
            f"{folder} does not say which weights its adapters were made for: whether they are "
            "this base's cannot be checked",
            stacklevel=2,
        )
    elif check and theirs != own:
        raise ValueError(
            f"the adapters in {folder} were made for {notes.get('base') or 'another base'!r} with "
            f"weights {str(theirs)[:12]}, and this is {flow.name or type(flow).__name__!r} with "
            f"weights {str(own)[:12]}: load the base that they were made for, or tune again on "
            "this one"
        )
    found = read_config(folder)
    _refuse_adapted(flow)
    from peft import LoraConfig  # seconds: not before what it is for is there

    known = LoraConfig.__dataclass_fields__
    try:
        config = LoraConfig(**{k: v for k, v in found.items() if k in known and k != "peft_type"})
        tuned = _inject(flow, config)
    except (ValueError, TypeError) as error:
        raise ValueError(f"the adapters in {folder} do not fit this base: {error}") from None
    state = {
        name.removeprefix(PREFIX): p
        for name, p in safetensors.torch.load_file(folder / WEIGHTS).items()
    }
    own_state = {str(_plain(name, DEFAULT)): p for name, p in tuned.adapters().items()}
    missing, unknown = own_state.keys() - state.keys(), state.keys() - own_state.keys()
    wrong = [n for n in own_state.keys() & state.keys() if own_state[n].shape != state[n].shape]
    if missing or unknown or wrong:
        example = min([*unknown, *missing, *wrong])
        raise ValueError(
            f"the adapters in {folder} do not fit this base: {len(unknown)} are for layers that "
            f"it does not have, {len(missing)} of its own are missing, {len(wrong)} have another "
            f"shape (for instance {example}): they were made for another model, or the file "
            f"and {CONFIG} are not from the same save"
        )
    with torch.no_grad():
        for name, p in own_state.items():
            p.copy_(state[name])
    return tuned.at(scale)


def _present(file: Path) -> Path:
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} is missing: a folder of adapters holds {CONFIG} and {WEIGHTS}"
        )
    return file
