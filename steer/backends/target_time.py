"""The embedding of a jump's end in FLUX.3's own transformer, which makes its base a flow map.

The transformer of a map (`flow_map=True`) adds an embedding of the jump's end to its start's,

    e(sigma) + T f(1000 tau),    sigma = 1 - s,  tau = 1 - t,

with f its sinusoids and T two layers, `target_timestep_embedder`. The base has no T. A new T is
the embedder of the start with its last layer set to zero: then it adds nothing, and every jump is
an Euler step of the base, bit for bit.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["FORM", "TargetTime", "fill", "is_blank"]

FORM = "target_timestep_embedder"


class TargetTime(nn.Module):
    """An embedder of the jump's end for a FLUX.3 transformer, of the base or of a map.

    In a map it replaces the existing one; in the base it is added to `timestep_embedder`, which
    gives the same network. Its tensors have the same names as in the transformer.

    Args:
        embedder: T, (n, channels) -> (n, width).
    """

    def __init__(self, embedder: Any) -> None:
        super().__init__()
        self.linear_1: nn.Linear = embedder.linear_1
        self.linear_2: nn.Linear = embedder.linear_2
        self.scale = 1.0

    @property
    def config(self) -> dict[str, Any]:
        """Its configuration: the format, and the sizes of its layers."""
        width, channels = self.linear_1.weight.shape
        return {"form": FORM, "channels": channels, "width": width}

    def forward(self, waves: Tensor) -> Tensor:
        """Return T of the end's sinusoids (n, channels), (n, width)."""
        inside = self.linear_1(waves.to(self.linear_1.weight.dtype))
        return self.linear_2(nn.functional.silu(inside)).to(waves.dtype)

    @contextmanager
    def told(self, network: nn.Module, now: Tensor, target: Tensor) -> Iterator[None]:
        """Pass the end of the jump to the transformer's calls in this block.

        Args:
            network: the transformer.
            now: noise level at the start of the jump, (n,); the call itself already has it.
            target: at its end, (n,).
        """
        one: Any = network
        own = one.target_timestep_embedder

        def replace(module: nn.Module, given: tuple[Tensor], made: Tensor) -> Tensor:
            own = self(given[0])
            return own if self.scale == 1 else made + self.scale * (own - made)

        def add(module: nn.Module, given: tuple[Tensor], made: Tensor) -> Tensor:
            waves = one.time_proj(target.to(made.dtype) * 1000).to(made.dtype)
            return made + self.scale * self(waves)

        if own is None:
            handle = one.timestep_embedder.register_forward_hook(add)
        else:  # a map gets the end as an argument
            handle = own.register_forward_hook(replace)
        try:
            yield
        finally:
            handle.remove()

    def scale_by(self, factor: float) -> None:
        """Interpolate from the transformer's own embedding of the end, if any."""
        self.scale *= factor

    def check(self, network: nn.Module) -> None:
        """Raise an error if a transformer has no embedding of this width."""
        start = getattr(network, "timestep_embedder", None)
        first: Any = getattr(start, "linear_1", None)
        shape = None if first is None else tuple(first.weight.shape)
        if not hasattr(network, FORM) or shape != tuple(self.linear_1.weight.shape):
            width, channels = self.linear_1.weight.shape
            raise ValueError(
                f"this embedder of the jump's end is for a FLUX.3 transformer of width {width} "
                f"with {channels} sinusoids, and {type(network).__name__} is none: give the base "
                "that it was trained for"
            )

    @classmethod
    def fresh(cls, network: Any) -> "TargetTime":
        """Return a copy of a map's own embedder, or an untrained one for the base."""
        own = network.target_timestep_embedder
        if own is not None:
            return cls(copy.deepcopy(own)).float()
        made = copy.deepcopy(network.timestep_embedder).float()
        nn.init.zeros_(made.linear_2.weight)
        if made.linear_2.bias is not None:
            nn.init.zeros_(made.linear_2.bias)
        return cls(made)

    @classmethod
    def of(cls, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> "TargetTime":
        """Make the embedder from a file's configuration and tensors, in float32, for inference.

        Raises:
            RuntimeError: tensors of other sizes than `config` says.
        """
        channels, width = int(config["channels"]), int(config["width"])
        with torch.device("meta"):
            empty: Any = nn.Module()
            empty.linear_1 = nn.Linear(channels, width, bias="linear_1.bias" in state)
            empty.linear_2 = nn.Linear(width, width, bias="linear_2.bias" in state)
        made = cls(empty)
        made.load_state_dict({k: v.float() for k, v in state.items()}, assign=True)
        return made.eval().requires_grad_(False)


def is_blank(network: Any) -> bool:
    """Return whether a map's transformer was loaded from a base's file: its embedder has no data.

    `from_pretrained(base, flow_map=True)` leaves it on the meta device, without a warning.
    """
    own = network.target_timestep_embedder
    return own is not None and any(p.is_meta for p in own.parameters())


@torch.no_grad()
def fill(network: Any) -> None:
    """Add an untrained embedder to a map's transformer that was loaded from a base's file."""
    start, own = network.timestep_embedder, network.target_timestep_embedder
    weight = start.linear_1.weight
    own.to_empty(device=weight.device).to(weight.dtype)
    own.load_state_dict(start.state_dict())
    for p in own.linear_2.parameters():
        p.zero_()
