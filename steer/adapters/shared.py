"""Adapters as the file that diffusers' pipelines load, `pytorch_lora_weights.safetensors`."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from steer.adapters.config import scaling_of
from steer.files import pack

__all__ = ["SHARED", "folded", "shared_file"]

SHARED = "pytorch_lora_weights.safetensors"
"""The name that diffusers looks for in a folder."""


def folded(
    config: Mapping[str, Any],
    state: Mapping[str, Tensor],
    component: str,
    inside: str | None = None,
    scale: float = 1.0,
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Return adapters under diffusers' names, `component.layer.lora_A.weight`, and their ranks.

    B is multiplied by `scale alpha / r`, so that alpha equals r, also for readers that ignore
    alpha.

    Args:
        config: what is understood of peft's configuration.
        state: tensors by their names in the flow.
        component: what the pipeline calls its denoiser.
        inside: the attribute of the model that is this denoiser. Default: the first part of the
            layers' names, where all share it.
        scale: of the adapters, to be their new scale 1.

    Raises:
        ValueError: a layer is not inside, or a tensor that is no A and no B.
    """
    if inside is None:
        heads = {name.partition(".")[0] for name in state}
        inside = heads.pop() if len(heads) == 1 else ""
    lead = f"{inside}." if inside else ""
    renamed: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for name, p in sorted(state.items()):
        layer, _, rest = name.rpartition(".lora_")
        if rest not in ("A.weight", "B.weight") or f"{layer}.lora_A.weight" not in state:
            raise ValueError(
                f"the adapters have {name!r}, for which diffusers has no name: take format peft"
            )
        if not layer.startswith(lead):
            raise ValueError(f"layer {layer!r} is not inside {inside!r}: give another --inside")
        short = layer.removeprefix(lead)
        rank = len(state[f"{layer}.lora_A.weight"])
        if rest.startswith("B."):
            p = p * (scale * scaling_of(config, layer, rank))
        renamed[f"{component}.{short}.lora_{rest}"] = p
        ranks[short] = rank
    if not ranks:
        raise ValueError("there are no adapters in it, and nothing to export")
    return renamed, ranks


def shared_file(
    config: Mapping[str, Any],
    state: Mapping[str, Tensor],
    component: str = "transformer",
    inside: str | None = None,
    scale: float = 1.0,
    notes: Mapping[str, Any] | None = None,
) -> bytes:
    """Return adapters as the file that diffusers' `load_lora_weights` reads.

    Alpha is r in the header's `lora_adapter_metadata` too, which diffusers reads from 0.35 on.

    Args:
        config: what is understood of peft's configuration.
        state: tensors by their names in the flow.
        component: what the pipeline calls its denoiser.
        inside: the attribute of the model that is this denoiser, see `folded`.
        scale: of the adapters, to be their new scale 1.
        notes: for the file's header, beside diffusers' own.

    Raises:
        ValueError: as `folded`.
    """
    renamed, ranks = folded(config, state, component, inside, scale)
    common = max(ranks.values(), key=list(ranks.values()).count)
    others = {f"^{short}": rank for short, rank in ranks.items() if rank != common}
    header = {
        "peft_type": "LORA", "r": common, "lora_alpha": common, "rank_pattern": others,
        "alpha_pattern": others, "target_modules": sorted(ranks), "lora_dropout": 0.0,
        "bias": "none", "use_rslora": False, "inference_mode": True,
    }  # fmt: skip
    prefixed = {f"{component}.{key}": value for key, value in header.items()}
    return pack(renamed, {**(notes or {}), "lora_adapter_metadata": prefixed})
