"""LoRA files of other programs for a pipeline's flow: with the names of diffusers, kohya or peft.

The pipeline's own converters determine the layer of a tensor. Scales are multiplied into the
tensors, and the configuration is made here; nothing else is taken from a file.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from warnings import warn

import safetensors
import safetensors.torch
from torch import Tensor, nn

from steer.adapters.attach import Layers
from steer.adapters.config import scaling_of, understood
from steer.adapters.shared import SHARED
from steer.files import read_notes
from steer.flow import FlowMap

__all__ = ["lora_file", "pipe_of", "read_lora"]

OTHERS = ("dora_scale", "lokr_", "hada_", "oft_", "glora", "lora_mid")
"""Parts of the names of tensors of adapters that are more than `B A`."""


def lora_file(path: Path) -> Path:
    """Return the file of a LoRA, given the file itself or its folder.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: several files, or one that is not safetensors.
    """
    if path.is_dir():
        found = sorted(path.glob("*.safetensors"))
        chosen = [f for f in found if f.name == SHARED] or found
        if len(chosen) > 1:
            names = ", ".join(f.name for f in chosen)
            raise ValueError(f"{path} holds several LoRA files ({names}): give one of them")
        if chosen:
            return chosen[0]
        raise FileNotFoundError(f"{path} contains no LoRA: it has no .safetensors file")
    if not path.is_file():
        raise FileNotFoundError(f"no LoRA at {path}: give a .safetensors file or its folder")
    if path.suffix != ".safetensors":
        raise ValueError(
            f"{path} is not a .safetensors file: other formats can run code when they are read, "
            "so convert it first"
        )
    return path


def read_lora(pipe: Any, component: str, network: nn.Module, file: Path) -> Layers:
    """Return the layers of a LoRA file for a pipeline's denoiser.

    Args:
        pipe: the pipeline whose converters read the file.
        component: name of the denoiser in it.
        network: the denoiser.
        file: the file.

    Raises:
        ValueError: a damaged file, adapters of another kind, or none for this denoiser.
    """
    try:
        state = safetensors.torch.load_file(file)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file} is damaged ({error}): copy it again") from None
    strange = [name for name in state if any(part in name for part in OTHERS)]
    if strange:
        raise ValueError(
            f"{file} is more than a plain LoRA ({strange[0]}): only an update B A can be scaled "
            "and switched off. Load it by pipe.load_lora_weights, pipe.fuse_lora(), and steer that"
        )
    named = _converted(pipe, component, network, _alpha_folded(state), file)
    texts = sum(name.startswith("text_encoder") for name in named)
    if texts:
        warn(
            f"{file}: {texts} tensors are for text encoders and are ignored: only adapters of the "
            "denoiser are supported",
            stacklevel=3,
        )
    lead = f"{component}."
    own = {n.removeprefix(lead): p for n, p in named.items() if n.startswith(lead)}
    layers = _layers(own, _scales(file, component))
    modules = dict(network.named_modules())
    unknown = [name for name in layers if name not in modules]
    if unknown or not layers:
        example = f", such as {unknown[0]}" if unknown else ""
        raise ValueError(
            f"{file} was made for another base: {len(unknown)} of its {len(layers)} layers are "
            f"not in {type(network).__name__}{example}. Load the pipeline that it was made for"
        )
    return {name: _shaped(modules[name], *pair, name, file) for name, pair in layers.items()}


def _alpha_folded(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Multiply B by alpha / r and set alpha to r; alpha is dropped if the names are peft's."""
    found = dict(state)
    for down, up in (("lora_down", "lora_up"), ("lora_A", "lora_B")):
        for name in [n for n in state if n.endswith(f".{up}.weight")]:
            layer = name.removesuffix(f".{up}.weight")
            alpha, a = state.get(f"{layer}.alpha"), state.get(f"{layer}.{down}.weight")
            if alpha is None or a is None:
                continue
            found[name] = state[name] * (float(alpha) / len(a))
            if down == "lora_A":
                del found[f"{layer}.alpha"]
            else:
                found[f"{layer}.alpha"] = alpha.new_tensor(float(len(a)))
    return found


def _converted(
    pipe: Any, component: str, network: Any, state: dict[str, Tensor], file: Path
) -> dict[str, Tensor]:
    """Return tensors under diffusers' names, using the pipeline's own converters."""
    read = getattr(type(pipe), "lora_state_dict", None)
    if read is not None:
        more = {"unet_config": network.config} if component == "unet" else {}
        try:
            found = read(dict(state), return_alphas=True, **more)
        except (ValueError, KeyError, RuntimeError, AttributeError) as error:
            raise ValueError(
                f"{file} was made for another base: {type(pipe).__name__} cannot read its names "
                f"({error})"
            ) from None
        state = found[0] if isinstance(found, tuple) else found
    return {k.removeprefix("base_model.model."): v for k, v in state.items()}


def _scales(file: Path, component: str) -> dict[str, Any] | None:
    """Return the configuration in a file's header, if diffusers or this package wrote one."""
    header = read_notes(file).get("lora_adapter_metadata")
    if not isinstance(header, Mapping):
        return None
    lead = f"{component}."
    own = {k.removeprefix(lead): v for k, v in header.items() if str(k).startswith(lead)}
    return understood({"peft_type": "LORA", **own}, file) if own else None


def _layers(own: Mapping[str, Tensor], config: Mapping[str, Any] | None) -> Layers:
    from diffusers.utils import convert_unet_state_dict_to_peft

    if own and not any(".lora_A." in name for name in own):
        own = convert_unet_state_dict_to_peft(dict(own))
    found: Layers = {}
    for name, a in own.items():
        layer, _, rest = name.rpartition(".lora_A.")
        b = own.get(f"{layer}.lora_B.weight")
        if rest == "weight" and b is not None:
            scale = 1.0 if config is None else scaling_of(config, layer, len(a))
            found[layer] = a, b * scale
    return found


def _shaped(
    layer: nn.Module, a: Tensor, b: Tensor, name: str, file: Path
) -> tuple[Tensor, Tensor]:
    """Return A and B in the layer's shape: a 1 x 1 convolution may be stored as a linear layer."""
    if isinstance(layer, nn.Linear) and a.ndim == 4:
        a, b = a.flatten(1), b.flatten(1)
    weight = getattr(layer, "weight", None)
    if weight is None or b.shape[0] != weight.shape[0] or a.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{file} was made for another base: its layer {name} is {b.shape[0]} x {a.shape[1]}, "
            f"and this one's is {tuple(weight.shape) if weight is not None else 'no layer'}"
        )
    return a, b


def pipe_of(flow: FlowMap) -> Any:
    """Return the pipeline that a flow wraps."""
    source = getattr(flow, "source", None)
    if source is None:
        return pipe_of(flow.student)  # type: ignore[arg-type]
    return source.pipe
