"""What all views of one tuned flow share: its adapted layers, one scale at a time, and a lock."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from steer.flow import FlowMap

__all__ = ["Afresh", "Switch", "as_now"]


class Afresh(AbstractContextManager[None]):
    """A context that may be entered again and again, as a graph that is kept needs it.

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
    """The adapted layers of a flow, which all its views use, each at its own scale.

    A layer can have one scale at a time. So a call of a view sets it, holding the lock, and sets
    it back: calls from several threads wait for each other. The lock belongs to the thread, so
    that a view may call another, and that a checkpointed call may be made again in the backward
    pass. A flow whose own velocity takes gradients on a GPU is the one that should not be
    checkpointed from two threads at once: the backward thread would wait for itself.

    A copy (`copy.deepcopy`, pickle) has its own layers, and a lock of its own.

    Args:
        flow: the flow whose layers have adapters, without bound prompts.
        layers: those layers, peft's.
        shared: the modules of the flow that are not its denoiser's, and belong to the base too:
            while a view is called, their parameters require no gradients, see `trained`.
    """

    def __init__(
        self, flow: FlowMap, layers: Sequence[Any], shared: Sequence[nn.Module] = ()
    ) -> None:
        self.flow, self.layers, self.shared = flow, tuple(layers), tuple(shared)
        self.trained: tuple[nn.Module, ...] = ()
        """Which of the shared modules are trained with the adapters: they ask for gradients."""
        self.traced = any("compiled_by" in vars(m) for m in flow.modules())
        """Whether layers are compiled: scales are tensors then, so that none is a new graph."""
        self._scales: dict[float, Tensor] = {}
        self._blocks = [m for m in flow.modules() if isinstance(m, nn.TransformerEncoderLayer)]
        self._lock = threading.RLock()

    def __reduce__(self) -> tuple[Any, ...]:
        state = {"trained": self.trained}  # a lock cannot be copied
        return Switch, (self.flow, self.layers, self.shared), state

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Keep other threads from the layers."""
        with self._lock:
            yield

    @contextmanager
    def at(self, adapter: str, scale: float) -> Iterator[None]:
        """Set the layers to a scale of one of their adapters, for this thread; 0: to the base."""
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
                        layer.set_scale(adapter, scale)  # times alpha / r, whatever it was before
                        if self.traced:
                            layer.scaling[adapter] = self._tensor(layer.scaling[adapter])
                for block in self._blocks if scale else ():  # its kernel reads the weights alone
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
        """Return a scale as a tensor on the host, which is no constant of a graph."""
        if scale not in self._scales:
            self._scales[scale] = torch.tensor(scale, dtype=torch.float64)
        return self._scales[scale]


def as_now(module: nn.Module) -> AbstractContextManager[None]:
    """Return a context in which adapters are set as they are now, and back again after it.

    For what recomputes a call in the backward pass, when they may be set otherwise.
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
    """Switch one of peft's layers; past `nn.Module`, whose way to set takes ten times as long."""
    own = vars(layer)
    own["_disable_adapters"], own["_active_adapter"] = off, active
