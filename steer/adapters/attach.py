"""Adapters as matrices, keyed by layer name: attach them to a flow, or extract them from one."""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from steer.adapters.inject import inject, refuse_adapted, twin
from steer.adapters.lora import DEFAULT, Adapted
from steer.adapters.targets import name_of_denoiser, targets
from steer.flow import FlowMap

__all__ = ["Layers", "attach", "has_adapters", "parted"]

Layers = dict[str, tuple[Tensor, Tensor]]
"""Layer of the denoiser -> A and B, whose update is `B A` without a further scale."""


def attach(
    flow: FlowMap, layers: Mapping[str, tuple[Tensor, Tensor]], scale: float = 1.0
) -> Adapted:
    """Put adapters on layers of a flow's denoiser.

    Args:
        flow: the base, which is not changed.
        layers: name in the denoiser -> A and B, whose update is `B A` at scale 1.
        scale: factor for the update.

    Raises:
        ValueError: the flow has adapters already, or peft cannot adapt one of the layers.
    """
    from peft import LoraConfig, set_peft_model_state_dict

    refuse_adapted(flow)
    inside = name_of_denoiser(flow)
    full = {f"{inside}.{name}" if inside else name: pair for name, pair in layers.items()}
    ranks = [len(a) for a, _ in full.values()]
    common = max(ranks, key=ranks.count)
    others = {f"^{name}": len(a) for name, (a, _) in full.items() if len(a) != common}
    config = LoraConfig(
        r=common,
        lora_alpha=common,
        target_modules=list(full),
        rank_pattern=others,
        alpha_pattern=dict(others),
        base_model_name_or_path=flow.name or None,
    )
    tuned = inject(flow, config, list(full), targets(flow).beside)
    tensors = {
        f"{name}.lora_{which}.weight": p
        for name, pair in full.items()
        for which, p in zip("AB", pair, strict=True)
    }
    set_peft_model_state_dict(tuned.switch.flow, tensors, DEFAULT)
    return tuned.at(scale)


def has_adapters(flow: FlowMap) -> bool:
    """Return whether a flow has peft adapters: ours, or those of its pipeline."""
    if isinstance(flow, Adapted):
        return True
    if not any(hasattr(m, "peft_config") for m in flow.modules()):
        return False
    from peft.tuners.tuners_utils import BaseTunerLayer

    return any(isinstance(m, BaseTunerLayer) for m in flow.modules())


@torch.no_grad()
def parted(flow: FlowMap) -> tuple[FlowMap, Layers]:
    """Return a flow without its adapters, and what they add at their present scales.

    Several active adapters are concatenated along the rank.

    Args:
        flow: a view of a tuned flow, or a flow whose pipeline has LoRAs loaded; it is not changed.

    Raises:
        ValueError: adapters that were fused into the weights, are not a plain LoRA, are outside
            the denoiser, or are all switched off.
    """
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    inner, context = flow, nullcontext()
    if isinstance(flow, Adapted):
        inner, context = flow.flow, flow.switch.at(flow.adapter, flow.scale)  # type: ignore[assignment]
    plain = twin(inner, targets(inner).beside)
    inside = name_of_denoiser(inner)
    lead = f"{inside}." if inside else ""
    found: Layers = {}
    with context:
        for name, layer in list(inner.named_modules()):
            if not isinstance(layer, BaseTunerLayer):
                continue
            if not (isinstance(layer, LoraLayer) and name.startswith(lead)):
                raise ValueError(
                    f"the adapters on {name} ({type(layer).__name__}) are not a LoRA of the "
                    "denoiser, and only a LoRA can be tuned further: remove them first"
                )
            pair = _sum_of(layer, name)
            if pair is not None:
                found[name.removeprefix(lead)] = pair
            parent, _, leaf = name.rpartition(".")
            copied: Any = plain.get_submodule(name)
            setattr(plain.get_submodule(parent), leaf, copied.get_base_layer())
    if not found:
        raise ValueError(
            "the flow has adapters, and all of them are disabled: enable those to tune further, "
            "or remove them (pipe.unload_lora_weights())"
        )
    for module in plain.modules():
        vars(module).pop("peft_config", None)
        vars(module).pop("_hf_peft_config_loaded", None)
    return plain, found


def _sum_of(layer: Any, name: str) -> tuple[Tensor, Tensor] | None:
    """Return A and B of a layer's active adapters combined; None if it has none."""
    if layer.merged:
        raise ValueError(
            f"the adapters on {name} are fused into its weights: pipe.unfuse_lora() first, or "
            "unload them to tune the fused weights"
        )
    if any(getattr(layer, "use_dora", {}).values()) or getattr(layer, "lora_variant", None):
        raise ValueError(
            f"the adapters on {name} are more than B A: only a plain LoRA can be tuned"
        )
    active = [] if layer.disable_adapters else layer.active_adapters
    pairs = [
        (layer.lora_A[key].weight, layer.lora_B[key].weight * layer.scaling[key])
        for key in active
        if key in layer.lora_A and layer.scaling[key]
    ]
    if not pairs:
        return None
    a, b = zip(*pairs, strict=True)
    return torch.cat(a).detach().clone(), torch.cat(b, 1).detach().clone()
