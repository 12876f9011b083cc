"""What all views of a tuned flow share: its adapted layers, their current scale, and a lock."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from steer.flow import FlowMap

__all__ = ["Afresh", "Switch", "as_now"]


class Afresh(AbstractContextManager[None]):
    """A context that may be entered repeatedly, as a retained graph requires.

    Args:
        make: returns a new context each time.
    """

    def __init__(self, make: Callable[[], AbstractContextManager[None]]) -> None:
        self.make = make
        self.open: list[AbstractContextManager[None]] = []

    def __enter__(self) -> None:
        self.open.append(self.make())
        self.open[-1].__enter__()

    def __exit__(self, *error: Any) -> bool | None:
        return self.open.pop().__exit__(*error)


class Switch:
    """The adapted layers of a flow, which all its views share, each with its own scale.

    A layer can have only one scale at a time. So a call of a view takes the lock, sets the scale
    and restores it afterwards: calls from several threads wait for each other. The lock is
    reentrant, so that a view may call another view, and a checkpointed call may be recomputed in
    the backward pass. A flow whose own velocity takes gradients on a GPU must not be checkpointed
    from two threads at once, because that deadlocks in the backward thread.

    A copy (`copy.deepcopy`, pickle) has its own layers and its own lock.

    Args:
        flow: the flow whose layers have adapters, without bound prompts.
        layers: those layers, peft's.
        shared: modules of the flow outside its denoiser, which belong to the base as well. While a
            view is called, their parameters require no gradients, see `trained`.
    """

    def __init__(
        self, flow: FlowMap, layers: Sequence[Any], shared: Sequence[nn.Module] = ()
    ) -> None:
        self.flow, self.layers, self.shared = flow, tuple(layers), tuple(shared)
        self.trained: tuple[nn.Module, ...] = ()
        """The shared modules that are trained with the adapters and require gradients."""
        self.traced = any("compiled_by" in vars(m) for m in flow.modules())
        """Whether layers are compiled. Scales are then tensors, so that no graph is added."""
        self._scales: dict[float, Tensor] = {}
        self._blocks = [m for m in flow.modules() if isinstance(m, nn.TransformerEncoderLayer)]
        self._lock = threading.RLock()

    def __reduce__(self) -> tuple[Any, ...]:
        state = {"trained": self.trained}  # a lock cannot be copied
        return Switch, (self.flow, self.layers, self.shared), state

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Hold the lock on the layers."""
        with self._lock:
            yield

    @contextmanager
    def at(self, adapter: str, scale: float) -> Iterator[None]:
        """Set the layers to a scale of one of their adapters; scale 0 is the base."""
        with self._lock:
            before = [
                (m._disable_adapters, m._active_adapter, m.scaling[adapter]) for m in self.layers
            ]
            fast = [block.activation_relu_or_gelu for block in self._blocks]
            trained = {p for m in self.trained for p in m.parameters()}
            asking = [
                p
                for m in self.shared
                for p in m.parameters()
                if p.requires_grad and p not in trained
            ]
            try:
                for layer in self.layers:
                    _set(layer, scale == 0, [adapter])
                    if scale:
                        layer.set_scale(adapter, scale)  # times alpha / r, always
                        if self.traced:
                            layer.scaling[adapter] = self._tensor(layer.scaling[adapter])
                for block in self._blocks if scale else ():  # its kernel reads only the weights
                    block.activation_relu_or_gelu = 0
                for p in asking:
                    p.requires_grad_(False)
                yield
            finally:
                for layer, (off, active, scaling) in zip(self.layers, before, strict=True):
                    _set(layer, off, active)
                    layer.scaling[adapter] = scaling
                for block, kind in zip(self._blocks, fast, strict=True):
                    block.activation_relu_or_gelu = kind
                for p in asking:
                    p.requires_grad_(True)

    def _tensor(self, scale: float) -> Tensor:
        """Return a scale as a tensor on the host, so that it is not a constant of a graph."""
        if scale not in self._scales:
            self._scales[scale] = torch.tensor(scale, dtype=torch.float64)
        return self._scales[scale]


def as_now(module: nn.Module) -> AbstractContextManager[None]:
    """Return a context that restores the adapters' current setting, and resets it afterwards.

    For recomputing a call in the backward pass, when the setting may be different.
    """
    layers: list[Any] = [m for m in module.modules() if "_disable_adapters" in vars(m)]
    now = [_setting(m) for m in layers]

    @contextmanager
    def again() -> Iterator[None]:
        then = [_setting(m) for m in layers]
        try:
            _put(layers, now)
            yield
        finally:
            _put(layers, then)

    return Afresh(again)


def _setting(layer: Any) -> tuple[bool, Any, dict[str, float]]:
    return layer._disable_adapters, layer._active_adapter, dict(layer.scaling)


def _put(layers: Sequence[Any], settings: Sequence[tuple[bool, Any, dict[str, float]]]) -> None:
    for layer, (off, active, scaling) in zip(layers, settings, strict=True):
        _set(layer, off, active)
        layer.scaling.update(scaling)


def _set(layer: Any, off: bool, active: Any) -> None:
    """Set the state of a peft layer, bypassing `nn.Module.__setattr__`: ten times faster."""
    own = vars(layer)
    own["_disable_adapters"], own["_active_adapter"] = off, active
