"""Which weights adapters were made for: a hash of a flow's weights."""

import hashlib

import torch
from torch import Tensor, nn

from steer.adapters.lora import Adapted
from steer.adapters.targets import plain_name
from steer.flow import FlowMap

__all__ = ["WHOLE", "fingerprint"]

WHOLE = 500_000_000
"""Values of a flow whose weights are hashed whole: 1e9 bytes in bfloat16."""

SAMPLE = 4096
"""Values of each tensor that are hashed of a larger flow's weights."""


def fingerprint(flow: FlowMap) -> str:
    """Return a hash of a flow's weights, its adapters left out, rounded to bfloat16.

    Of a diffusers pipeline the denoiser's alone: another autoencoder takes the same adapters.

    So it is the same in float32 and in bfloat16, on any device. Of a flow of more than `WHOLE`
    values, names and shapes are hashed, and of each tensor `SAMPLE` values, evenly spaced from the
    first to the last: seconds where all would take minutes. Other training changes all values;
    weights that were changed by hand at a few places may have the hash of the unchanged ones.
    """
    inner: nn.Module = flow.flow if isinstance(flow, Adapted) else flow
    inner = flow.denoiser if flow.component else inner
    digest = hashlib.sha256()
    named = {
        plain_name(name.replace("base_layer.", "")): p
        for name, p in inner.state_dict().items()
        if "lora_" not in name
    }
    large = sum(p.numel() for p in named.values()) > WHOLE
    for name in sorted(named):  # the order of the base's own names
        p = named[name].detach()
        digest.update(f"{name} {tuple(p.shape)}".encode())
        values = (_spaced(p) if large else p).to("cpu")
        if values.is_floating_point():
            values = values.to(torch.bfloat16).view(torch.int16)
        digest.update(values.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _spaced(values: Tensor) -> Tensor:
    """Return at most `SAMPLE` of the values, evenly spaced, the first and the last among them."""
    n = values.numel()
    if n <= SAMPLE:
        return values
    index = torch.arange(SAMPLE, device=values.device) * (n - 1) // (SAMPLE - 1)
    return values.flatten()[index]
