"""Adapters that come as matrices by the names of their layers, put on a flow."""

from collections.abc import Mapping

from torch import Tensor

from steer.adapters.inject import inject, refuse_adapted
from steer.adapters.lora import DEFAULT, Adapted
from steer.adapters.targets import name_of_denoiser, targets
from steer.flow import FlowMap

__all__ = ["attach"]


def attach(
    flow: FlowMap, layers: Mapping[str, tuple[Tensor, Tensor]], scale: float = 1.0
) -> Adapted:
    """Put adapters on layers of a flow's denoiser.

    Args:
        flow: the base; it stays as it is.
        layers: name in the denoiser -> A and B, whose update is `B A` at scale 1.
        scale: what it is multiplied by.

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
