"""Adapters in ComfyUI's naming.

ComfyUI reads a scale only from `.alpha` tensors, never from a file's header, so it is multiplied
into B. It knows diffusers' own names for most transformers, kohya's for the UNet of Stable
Diffusion, and the authors' for FLUX.3.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from steer.adapters.shared import folded
from steer.backends.folders import needs_diffusers
from steer.files import pack

__all__ = ["comfyui_file"]

FLUX3 = {
    ".attn.to_q.": ".q_proj.",
    ".attn.to_k.": ".k_proj.",
    ".attn.to_v.": ".v_proj.",
    ".attn.to_out.0.": ".attn_out.",
    ".ff.linear_in.": ".mlp_in.",
    ".ff.linear_out.": ".mlp_out.",
    "single_transformer_blocks.": "single_blocks.",
}
"""diffusers' names in FLUX.3 -> its authors'."""


def comfyui_file(
    config: Mapping[str, Any],
    state: Mapping[str, Tensor],
    component: str,
    pipeline: str = "",
    inside: str | None = None,
    scale: float = 1.0,
    notes: Mapping[str, Any] | None = None,
) -> bytes:
    """Return adapters as a file for ComfyUI's `models/loras`.

    Args:
        config: the known entries of peft's configuration.
        state: tensors by their names in the flow.
        component: name of the denoiser in the pipeline.
        pipeline: the pipeline's class, because FLUX.3 has its own names.
        inside: see `steer.adapters.shared.folded`.
        scale: of the adapters, to be their new scale 1.
        notes: for the file's header.

    Raises:
        ValueError: as `folded`.
        ModuleNotFoundError: the adapters are for a UNet, and diffusers, which has kohya's names,
            is not installed.
    """
    found, _ = folded(config, state, component, inside, scale)
    if component == "unet":
        needs_diffusers()
        from diffusers.utils import convert_state_dict_to_kohya

        found = convert_state_dict_to_kohya(found)
    elif pipeline.startswith("Flux3"):
        found = {_flux3(name.removeprefix(f"{component}.")): p for name, p in found.items()}
    return pack(found, dict(notes or {}))


def _flux3(name: str) -> str:
    for diffusers, theirs in FLUX3.items():
        name = name.replace(diffusers, theirs)
    return f"diffusion_model.{name}"
