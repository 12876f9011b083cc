"""Check for each layer whether gradients pass correctly through quantised or cast weights.

A layer with int8, fp8 or GGUF weights multiplies by the dequantised weights, in the forward and in
the backward pass. If activations are quantised as well (dynamic quantisation), the layer is
piecewise constant and has no gradient. Together with layers that have one, the total gradient is
then wrong, without an error.
"""

from typing import Any

import torch
from torch import Tensor, nn

from steer.backends.checks import dtype_of

__all__ = ["is_quantised", "unsound"]

WRONG = 0.1
"""Relative tolerance between a layer's gradient and finite differences, because of rounding."""


def is_quantised(p: nn.Parameter) -> bool:
    """Return whether a weight has a special class: that of torchao, GGUF or bitsandbytes."""
    from torch._subclasses.fake_tensor import FakeTensor
    from torch.distributed.tensor import DTensor

    plain = type(p) is nn.Parameter and type(p.data) is Tensor
    return not plain and not isinstance(p, FakeTensor | DTensor) and p.device.type != "meta"


def unsound(network: nn.Module) -> str:
    """Return why gradients through a network's weights would be wrong; empty if they are correct.

    Each linear layer with quantised weights is called with three rows. It is linear, so with
    `D = W d`, from calls at x + d and x - d, the gradient g of `<y(x), D>` has `<g, d> = |D|²`.

    Args:
        network: the denoiser.
    """
    cast = _cast(network)
    if cast:
        return cast
    dtype = dtype_of(network) if hasattr(network, "dtype") else torch.float32
    for name, layer in network.named_modules():
        weight = layer._parameters.get("weight")
        if weight is None or not is_quantised(weight) or isinstance(layer, nn.Embedding):
            continue
        kind = type(weight).__name__
        if not isinstance(layer, nn.Linear):
            return (
                f"the denoiser's {name} is a {type(layer).__name__} with weights of {kind}, of "
                "which it is not known whether its gradient is right: leave it as it is when "
                "quantising"
            )
        off = _off(layer, dtype)
        if off is None or not off < WRONG:
            said = "has no gradient" if off is None else f"has a gradient that is {off:.0%} off"
            return (
                f"the denoiser's layer {name} ({kind}) {said}: activations that are quantised "
                "make a layer a staircase. Quantise the weights alone (torchao's "
                "Int8WeightOnlyConfig or Float8WeightOnlyConfig, GGUF), or load it without "
                "quantisation"
            )
    return ""


def _off(layer: nn.Linear, dtype: torch.dtype) -> float | None:
    """Return the error of a layer's gradient against finite differences; None: no gradient."""
    device = next(layer.parameters()).device
    generator = torch.Generator().manual_seed(0)
    x, d = torch.randn(2, 1, layer.in_features, generator=generator).to(device, dtype)
    with torch.no_grad():
        step = (layer(x + d) - layer(x - d)).float() / 2
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        y = layer(leaf)
        if not y.requires_grad:
            return None
        (gradient,) = torch.autograd.grad((y.float() * step).sum(), leaf, allow_unused=True)
    if gradient is None:
        return None
    size = step.square().sum()
    return float(((gradient.float() * d.float()).sum() - size).abs() / size.clamp(min=1e-30))


def _cast(network: nn.Module) -> str:
    """Return why weights that diffusers casts around each call would give no gradient."""
    for name, layer in network.named_modules():
        hooks: Any = getattr(layer, "_diffusers_hook", None)
        if hooks is None or hooks.get_hook("layerwise_casting") is None:
            continue
        if not isinstance(layer, nn.Linear):
            return (
                f"the denoiser's {name} ({type(layer).__name__}) is cast to a smaller precision "
                "after each call (enable_layerwise_casting), and reads its weights once more in "
                "the backward pass: quantise the weights (torchao, GGUF), or leave casting out"
            )
    return ""
