"""Which weights adapters were made for: a hash of a flow's weights."""

import hashlib

import torch
from torch import Tensor, nn

from steer.adapters.lora import Adapted
from steer.adapters.targets import plain_name
from steer.flow import FlowMap

__all__ = ["WHOLE", "fingerprint"]

WHOLE = 500_000_000
"""Maximum number of values that are all hashed: 1e9 bytes in bfloat16."""

SAMPLE = 4096
"""Number of values of each tensor that are hashed for a larger flow."""


def fingerprint(flow: FlowMap) -> str:
    """Return a hash of a flow's weights rounded to bfloat16, without its adapters.

    For a diffusers pipeline only the denoiser is hashed, because the same adapters can be used
    with another autoencoder.

    The hash is the same in float32 and in bfloat16, and on any device. For a flow with more than
    `WHOLE` values, the names, the shapes and `SAMPLE` evenly spaced values of each tensor,
    including the first and the last, are hashed: this takes seconds instead of minutes. Further
    training changes all values and so the hash; a change of a few single values by hand may not.
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
    for name in sorted(named):  # in the order of the names in the base
        p = named[name].detach()
        digest.update(f"{name} {tuple(p.shape)}".encode())
        values = (_spaced(p) if large else p).to("cpu")
        if values.is_floating_point():
            values = values.to(torch.bfloat16).view(torch.int16)
        digest.update(values.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _spaced(values: Tensor) -> Tensor:
    """Return at most `SAMPLE` evenly spaced values, including the first and the last."""
    n = values.numel()
    if n <= SAMPLE:
        return values
    index = torch.arange(SAMPLE, device=values.device) * (n - 1) // (SAMPLE - 1)
    return values.flatten()[index]
