"""A flow with low-rank adapters (LoRA) at a given scale: base and tuned flow share one network.

Every adapted layer computes `W x + scale alpha / r B A x` (Hu et al. 2021, arXiv 2106.09685), with
B initialised to zero: at step 0, and always at scale 0, the tuned flow equals the base bit for
bit. There is no second copy of the network. peft implements the layers; `import steer` does not
load it.
"""

import copy
import math
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from steer.adapters.switch import Switch
from steer.flow import FlowMap, Wrapped
from steer.path import Time

__all__ = ["DEFAULT", "START", "Adapted", "at_least_single"]

DEFAULT = "default"
"""The name of a flow's first adapters."""

START = "start"
"""The name of the adapters that a run tunes further: its base includes them."""

T = TypeVar("T")


class Adapted(Wrapped):
    """A flow with adapters at a given scale: 0 is the base, 1 the tuned flow.

    This is a view: `at` and `given` return other views of the same tensors. Each call sets the
    adapters' scale and restores it afterwards. A checkpointed call does so again when it is
    recomputed in the backward pass, so that views of different scales can share one graph. The
    checkpointing of diffusers' `enable_gradient_checkpointing` does not: leave it off, and use
    this one. Calls from several threads are made one after the other.

    The adapters are the denoiser's (`FlowMap.denoiser`): `decode`, `encode` and `given` run with
    adapters off. Closed forms of the flow (`denoise`, `score`, `log_prob`) are evaluated at the
    view's scale, and are correct if they are computed by the adapted layers.

    Conversion to another dtype keeps the adapters in float32 or better. The denoiser's tensors are
    shared with the original flow until one of the two flows is moved to another device or dtype.
    All other modules are the same objects in both flows, and move for both; `train` and `eval` do
    not change them.

    Args:
        flow: the flow whose layers have adapters, prompts bound or not; `adapt` makes it.
        switch: those layers.
        adapter: which adapters of the layers.
        scale: factor for their update.
        checkpoint: whether to recompute each call in the backward pass instead of keeping its
            activations (Chen et al. 2016, arXiv 1604.06174).

    Raises:
        ValueError: a scale that is not finite.
    """

    def __init__(
        self,
        flow: FlowMap,
        switch: Switch,
        *,
        adapter: str = DEFAULT,
        scale: float = 1.0,
        checkpoint: bool = False,
    ) -> None:
        super().__init__(flow)
        _finite(scale)
        self.switch = switch
        self.adapter, self.scale, self.checkpoint = adapter, scale, checkpoint

    @property
    def checkpoint(self) -> bool:
        """Whether calls are recomputed in the backward pass.

        A pipeline does so itself, block by block in its denoiser and decoder.
        """
        return self._checkpoint

    @checkpoint.setter
    def checkpoint(self, on: bool) -> None:
        self._checkpoint = on
        if on and hasattr(self.flow, "checkpointing"):
            self.flow.checkpointing = True  # type: ignore[assignment]

    preview: Callable[["Adapted"], Any] | None = None
    """Returns a picture of samples of this flow and its base (a PIL image, or None); set if the
    run is known."""

    def _repr_html_(self) -> str:
        """Show in a notebook a description, and the same noise before and after tuning."""
        from steer.shown import page, picture

        image = None if self.preview is None else self.preview(self)
        return page(repr(self), *([] if image is None else [picture(image)]))

    def __repr__(self) -> str:
        """Describe the flow in one line; `tuned.flow` prints every layer."""
        config = self.configs[self.adapter]
        base = self.name or type(self.flow).__name__
        return (
            f"Adapted({base}, rank {config.r}, alpha {config.lora_alpha:g}, scale {self.scale:g}, "
            f"{len(self.layers)} adapted layers)"
        )

    @property
    def layers(self) -> tuple[Any, ...]:
        """The layers that have adapters."""
        return self.switch.layers

    @property
    def configs(self) -> dict[str, Any]:
        """Peft's configuration of each of the adapters, by their name."""
        return self.switch.flow.peft_config  # type: ignore[return-value]

    def at(self, scale: float = 1.0, adapter: str | None = None) -> Self:
        """Return the same flow at another scale, or with another of its adapters.

        Raises:
            ValueError: it has no such adapters, or the scale is not finite.
        """
        _finite(scale)
        if adapter is not None and adapter not in self.configs:
            raise ValueError(f"no adapters named {adapter!r}: there are {', '.join(self.configs)}")
        view = copy.copy(self)
        view._modules = dict(self._modules)
        view.scale, view.adapter = scale, self.adapter if adapter is None else adapter
        return view

    @property
    def base(self) -> Self:
        """The flow without its adapters; after further tuning, as that run began."""
        return self.at(1.0, START) if START in self.configs else self.at(0.0)

    def adapters(self, adapter: str | None = None) -> dict[str, nn.Parameter]:
        """Return the adapters' parameters by their name in the flow; empty if it has none."""
        name = re.escape(self.adapter if adapter is None else adapter)
        own = re.compile(rf".*\.lora_\w+\.{name}(\..*)?")
        return {n: p for n, p in self.switch.flow.named_parameters() if own.fullmatch(n)}

    def add(self, adapter: str, trainable: bool = False) -> None:
        """Add a second set of adapters, a copy of this view's: an average, or an old policy.

        All views have it; `at(adapter=...)` selects it.

        Args:
            adapter: its name.
            trainable: whether its parameters require gradients; the others are not changed.

        Raises:
            ValueError: there already are adapters of that name.
        """
        from peft import inject_adapter_in_model

        flow, layers = self.switch.flow, self.layers
        if adapter in self.configs:
            raise ValueError(f"there are adapters named {adapter!r} already: choose another name")
        before = {name: p.requires_grad for name, p in flow.named_parameters()}
        config = copy.deepcopy(self.configs[self.adapter])
        names = {id(m): name for name, m in flow.named_modules()}
        keys: dict[str, Any] = {f"{names[id(m)]}.lora_A.weight": None for m in layers}
        with self.switch.hold():
            active = [layer._active_adapter for layer in layers]
            with warnings.catch_warnings():  # a second set is intended
                warnings.simplefilter("ignore")
                with torch.random.fork_rng(devices=[]):
                    inject_adapter_in_model(config, flow, adapter, state_dict=keys)
            for layer, active_names in zip(layers, active, strict=True):
                layer._active_adapter = active_names
        with torch.no_grad():
            pairs = zip(self.adapters(adapter).values(), self.adapters().values(), strict=True)
            for p, q in pairs:
                p.data = q.detach().clone()
        for name, p in flow.named_parameters():
            p.requires_grad_(before.get(name, trainable))

    def train(self, mode: bool = True) -> Self:
        """Set the mode of the modules that the base does not share; `eval` likewise."""
        modes = [(m, m.training) for part in self.switch.shared for m in part.modules()]
        super().train(mode)
        for m, training in modes:
            m.training = training
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move all tensors, but keep the adapters in float32 or better, for small updates."""
        kept = [(p, p.data) for name, p in self.flow.named_parameters() if ".lora_" in name]
        super()._apply(fn, recurse)
        for p, values in kept:
            p.data = values.to(p.device, at_least_single(p.dtype))
            if p.grad is not None:
                p.grad = p.grad.to(p.dtype)
        return self

    def _switched(self, function: Callable[[Tensor], T], x: Tensor) -> T:
        """Apply a function of x at this view's scale, checkpointed if this view is."""
        switch, adapter, scale = self.switch, self.adapter, self.scale

        def run(x: Tensor) -> T:
            with switch.at(adapter, scale):
                return function(x)

        itself = getattr(self.flow, "checkpointing", False)
        if itself or not (self.checkpoint and torch.is_grad_enabled()):
            return run(x)
        return recomputed(run, x, use_reentrant=False)

    def call(self, name: str, x: Tensor, *times: Time) -> Tensor:
        """Call the inner flow at this scale, (n, *event)."""
        return self._switched(lambda x: getattr(self.flow, name)(x, *times), x)

    def log_prob(self, x: Tensor, t: Time = 1.0) -> Tensor | None:
        """Return the flow's log-density at this scale."""
        return self._switched(lambda x: self.flow.log_prob(x, t), x)

    def given(self, prompts: Sequence[str]) -> Self:
        """Bind prompts, with adapters off; returns itself if the flow takes none."""
        with self.switch.at(self.adapter, 0.0), torch.no_grad():
            return super().given(prompts)

    def decode(self, x: Tensor) -> Tensor:
        """Return the flow's images, adapters off."""
        with self.switch.at(self.adapter, 0.0):
            return super().decode(x)

    def encode(self, images: Tensor) -> Tensor:
        """Return the states that decode to the images, adapters off."""
        with self.switch.at(self.adapter, 0.0):
            return super().encode(images)


def _finite(scale: float) -> None:
    if not math.isfinite(scale):
        raise ValueError(
            f"the adapters' scale must be finite, got {scale}: 0 is the base, 1 tuned"
        )


def at_least_single(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype, or float32 for one of less precision.

    >>> at_least_single(torch.bfloat16), at_least_single(torch.float64)
    (torch.float32, torch.float64)
    """
    return torch.promote_types(dtype, torch.float32)
