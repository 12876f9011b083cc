"""Merge adapters into the weights of their layers: a plain flow that equals a tuned view."""

import copy
from collections import Counter
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from steer.adapters.inject import twin
from steer.adapters.lora import Adapted
from steer.flow import FlowMap

__all__ = ["merged"]


@torch.no_grad()
def merged(tuned: Adapted) -> FlowMap:
    """Return a plain flow with the adapters added to its weights, at the view's scale: a copy.

    Modules other than the denoiser are shared with the base. If layers with tied weights had
    adapters, each gets its own sum, and the weights are no longer tied. The flow has no name yet:
    `steer.load.save` makes it a model's folder.

    Raises:
        ValueError: the sum cannot be written into a layer's weights: those of a grouped
            convolution, or computed from others (spectral norm).
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    with tuned.switch.at(tuned.adapter, 1.0):
        flow = twin(tuned.flow, tuned.switch.shared, own=True)
    places = Counter(id(child) for m in flow.modules() for child in m._modules.values())
    named: list[tuple[str, Any]] = list(flow.named_modules())
    for name, layer in named:
        if isinstance(layer, BaseTunerLayer):
            plain: Any = layer.get_base_layer()
            if places[id(plain)] > 1:  # it is also used elsewhere, without adapters
                plain = copy.copy(plain)
                plain._parameters = dict(plain._parameters)
            if tuned.scale:
                _refuse_grouped(plain, name)
                # peft's own `merge` rounds the update before the addition; this rounds only once
                update = layer.get_delta_weight(tuned.adapter)  # type: ignore[attr-defined]
                _write(plain, (plain.weight + tuned.scale * update).to(plain.weight), name)
            parent, _, leaf = name.rpartition(".")
            setattr(flow.get_submodule(parent), leaf, plain)
    vars(flow).pop("peft_config", None)
    flow.name = ""
    return flow


def _refuse_grouped(layer: nn.Module, name: str) -> None:
    if getattr(layer, "groups", 1) > 1:
        raise ValueError(
            f"{name} is a grouped convolution, and its adapters see all channels: their sum with "
            "its weights is no grouped convolution. Keep the adapters, or tune without that layer"
        )


def _write(layer: Any, weight: Tensor, name: str) -> None:
    """Replace a layer's weight, through its parametrisation if it has one."""
    found: Tensor | None = None  # a hook recomputes it at the next call, in the old norms
    if parametrize.is_parametrized(layer, "weight"):
        with suppress(RuntimeError, ValueError, NotImplementedError):  # the wrong kind
            layer.weight = weight
            found = layer.weight
    elif "weight" in layer._parameters:
        layer.weight = nn.Parameter(weight, layer.weight.requires_grad)
        found = weight
    if found is None or not torch.allclose(found, weight, rtol=1e-3, atol=1e-5):
        raise ValueError(
            f"the weights of {name} are computed from others (a spectral norm, or the older "
            "torch.nn.utils.weight_norm), and their sum with the adapters is not of that kind. "
            "Keep the adapters, or take the norm off the base before tuning: "
            "torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight')"
        )
