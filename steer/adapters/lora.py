"""Low-rank adapters (LoRA) on a flow map: one network that is both the base and the tuned flow.

Every adapted layer computes `W x + scale alpha / r B A x` (Hu et al. 2021, arXiv 2106.09685), with
B zero at first: at step 0, and at scale 0 always, the tuned flow is the base bit for bit. There is
no second copy of the network. peft does the layers; `import steer` does not load it.
"""

import copy
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from steer.flow import FlowMap
from steer.noise import generator
from steer.path import Time

__all__ = ["DEFAULT", "Adapted", "adapt", "merged", "rejoin"]

DEFAULT = "default"


class Adapted(FlowMap):
    """A flow with adapters, seen at one scale: 0 is the base, 1 the tuned flow.

    A view: `at` and `given` return others on the same tensors. Each call switches the adapters and
    switches them back, and a checkpointed call does so again when it is recomputed in the
    backward pass, so that views of different scales can share one graph. A network's own
    checkpointing does not: leave it off, and use this one.

    Moves to another dtype keep the adapters in float32 or better. Moving this flow and moving the
    flow that it was made from are two things: tensors are shared until one of them is moved.

    Args:
        flow: a flow whose layers have adapters, see `adapt`.
        layers: those layers.
        adapter: which adapters of the layers.
        scale: what their update is multiplied by.
        checkpoint: whether to recompute each call in the backward pass instead of keeping its
            activations (Chen et al. 2016, arXiv 1604.06174).

    Raises:
        ValueError: a scale that is not finite.
    """

    def __init__(
        self,
        flow: FlowMap,
        layers: Sequence[Any],
        *,
        adapter: str = DEFAULT,
        scale: float = 1.0,
        checkpoint: bool = False,
    ) -> None:
        super().__init__()
        _finite(scale)
        self.flow, self.layers = flow, tuple(layers)
        self.adapter, self.scale, self.checkpoint = adapter, scale, checkpoint
        self.path, self.event_shape = flow.path, flow.event_shape
        self.evaluations, self.name = flow.evaluations, flow.name

    def _view(self, **changes: Any) -> "Adapted":
        view = copy.copy(self)
        view._modules = dict(self._modules)
        for name, value in changes.items():
            setattr(view, name, value)
        return view

    def at(self, scale: float = 1.0, adapter: str | None = None) -> "Adapted":
        """Return the same flow at another scale, or with another of its adapters.

        Raises:
            ValueError: it has no such adapters, or the scale is not finite.
        """
        _finite(scale)
        known = list(self.flow.peft_config)  # type: ignore[arg-type]
        if adapter is not None and adapter not in known:
            raise ValueError(f"no adapters named {adapter!r}: there are {', '.join(known)}")
        return self._view(scale=scale, adapter=self.adapter if adapter is None else adapter)

    @property
    def base(self) -> "Adapted":
        """The flow without its adapters."""
        return self.at(0.0)

    def adapters(self, adapter: str | None = None) -> dict[str, nn.Parameter]:
        """Return the adapters' parameters by their name in the flow; none where it has no such."""
        chosen = self.adapter if adapter is None else adapter
        named = self.flow.named_parameters()
        return {name: p for name, p in named if _plain(name, chosen) is not None}

    def add(self, adapter: str, trainable: bool = False) -> None:
        """Add a second set of adapters, a copy of this view's: an average, or an old policy.

        Every view has it, `at(adapter=...)` shows it.

        Args:
            adapter: its name.
            trainable: whether its parameters ask for gradients; the others stay as they are.

        Raises:
            ValueError: there is one of that name.
        """
        from peft import inject_adapter_in_model

        config: dict[str, Any] = self.flow.peft_config  # type: ignore[assignment]
        if adapter in config:
            raise ValueError(f"there are adapters named {adapter!r} already: choose another name")
        before = {name: p.requires_grad for name, p in self.flow.named_parameters()}
        active = [layer._active_adapter for layer in self.layers]
        with warnings.catch_warnings():  # a second set is what we want
            warnings.simplefilter("ignore")
            with torch.random.fork_rng(devices=[]):
                inject_adapter_in_model(copy.deepcopy(config[self.adapter]), self.flow, adapter)
        with torch.no_grad():
            pairs = zip(self.adapters(adapter).values(), self.adapters().values(), strict=True)
            for p, q in pairs:
                p.data = q.detach().clone()
        for name, p in self.flow.named_parameters():
            p.requires_grad_(before.get(name, trainable))
        for layer, names in zip(self.layers, active, strict=True):
            layer._active_adapter = names

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Adapted":
        """Move all tensors, but keep the adapters in float32 at least: small steps count there."""
        kept = [(p, p.data) for name, p in self.flow.named_parameters() if ".lora_" in name]
        super()._apply(fn, recurse)
        for p, values in kept:
            p.data = values.to(p.device, _at_least_single(p.dtype))
            if p.grad is not None:
                p.grad = p.grad.to(p.dtype)
        return self

    @contextmanager
    def _switched(self) -> Iterator[None]:
        name = self.adapter
        before = [(m._disable_adapters, m._active_adapter, m.scaling[name]) for m in self.layers]
        try:
            for layer in self.layers:
                layer._disable_adapters, layer._active_adapter = self.scale == 0, [name]
                layer.set_scale(name, self.scale)  # times alpha / r, whatever it was before
            yield
        finally:
            for layer, (off, active, scaling) in zip(self.layers, before, strict=True):
                layer._disable_adapters, layer._active_adapter = off, active
                layer.scaling[name] = scaling

    def _call(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        def run(x: Tensor) -> Tensor:
            with self._switched():
                return function(x)

        if not (self.checkpoint and torch.is_grad_enabled()):
            return run(x)
        return recomputed(run, x, use_reentrant=False)

    def velocity(self, x: Tensor, t: Time) -> Tensor:
        """Return the velocity at this scale, (n, *event)."""
        return self._call(lambda x: self.flow.velocity(x, t), x)

    def jump(self, x: Tensor, s: Time, t: Time) -> Tensor:
        """Return the jump at this scale, (n, *event)."""
        return self._call(lambda x: self.flow.jump(x, s, t), x)

    def given(self, prompts: Sequence[str]) -> "Adapted":
        """Bind prompts; itself, where the flow takes none."""
        bound = self.flow.given(prompts)
        return self if bound is self.flow else self._view(flow=bound)

    def decode(self, x: Tensor) -> Tensor:
        """Return the flow's images."""
        return self.flow.decode(x)

    def encode(self, images: Tensor) -> Tensor:
        """Return what decodes to the images."""
        return self.flow.encode(images)


def _finite(scale: float) -> None:
    if not math.isfinite(scale):
        raise ValueError(
            f"the adapters' scale must be finite, got {scale}: 0 is the base, 1 tuned"
        )


def _plain(name: str, adapter: str) -> str | None:
    """Return an adapter's parameter's name as peft's files have it; None if it is another's.

    >>> _plain("head.lora_A.default.weight", "default")
    'head.lora_A.weight'
    >>> _plain("up.head.lora_A.default.weight", "up")
    """
    found = re.fullmatch(rf"(.*\.lora_\w+)\.{re.escape(adapter)}(\..*)?", name)
    return found and found[1] + (found[2] or "")


def _at_least_single(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _sharing(flow: FlowMap) -> FlowMap:
    """Return new modules on the same storage, so that nothing done to them touches the flow."""
    tensors = [*flow.parameters(), *flow.buffers()]
    memo: dict[int, Any] = {}
    for tensor in tensors:
        same = tensor.detach()
        memo[id(tensor)] = (
            nn.Parameter(same, requires_grad=False) if isinstance(tensor, nn.Parameter) else same
        )
    return copy.deepcopy(flow, memo)


def rejoin(tuned: Adapted, flow: FlowMap) -> None:
    """Put a tuned flow back on its base's tensors and device, where something moved it away.

    Args:
        tuned: adapters on a twin of `flow`.
        flow: the base.
    """
    own = dict(flow.named_parameters()) | dict(flow.named_buffers())
    some = next(iter(flow.parameters()))
    twins = [*tuned.flow.named_parameters(), *tuned.flow.named_buffers()]
    for name, tensor in twins:
        base = own.get(name.replace("base_layer.", ""))
        tensor.data = tensor.data.to(some.device) if base is None else base.data


def _targets(flow: nn.Module) -> list[str]:
    """Name the linear layers and convolutions."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return [name for name, m in flow.named_modules() if isinstance(m, kinds)]


def _refuse_adapted(flow: FlowMap) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    if any(isinstance(m, BaseTunerLayer) for m in flow.modules()):
        raise ValueError(
            "the flow has adapters already: take the flow that they were put on, or add them to "
            "its weights first with steer.lora.merged"
        )


def _inject(flow: FlowMap, config: Any) -> Adapted:
    """Put adapters on new modules of the flow's tensors."""
    from peft import inject_adapter_in_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    twin = _sharing(flow)
    modes = {name: m.training for name, m in twin.named_modules()}
    with torch.random.fork_rng(devices=[]):  # peft draws from the global generator
        inject_adapter_in_model(config, twin, DEFAULT)
    twin.requires_grad_(False)
    tuned = Adapted(twin, [m for m in twin.modules() if isinstance(m, BaseTunerLayer)])
    tuned.train(flow.training)
    for name, m in twin.named_modules():
        m.training = modes.get(name.replace(".base_layer", ""), flow.training)
    for p in tuned.adapters().values():
        p.data = p.data.to(_at_least_single(p.dtype))
    return tuned


def adapt(
    flow: FlowMap,
    rank: int = 16,
    alpha: float | None = None,
    *,
    targets: Sequence[str] | None = None,
    dropout: float = 0.0,
    seed: int = 0,
) -> Adapted:
    """Put new adapters on a flow; the result shares the flow's tensors, and not its modules.

    The adapters are in float32 (float64 for a flow of doubles), and ask for no gradient until a
    trainer does: `for p in tuned.adapters().values(): p.requires_grad_()`.

    Args:
        flow: any flow with linear layers or convolutions; it stays as it is.
        rank: r.
        alpha: the update is scaled by alpha / r. Default: 2 r.
        targets: names of layers, or the ends of their names. Default: every linear layer and
            convolution.
        dropout: share of the inputs of the adapters that is dropped in training.
        seed: fixes A; B is zero.

    Raises:
        ValueError: the flow has no such layer or has adapters already, or a rank below one.
    """
    from peft import LoraConfig

    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    _refuse_adapted(flow)
    known = _targets(flow)
    if not known:
        raise ValueError(
            f"{type(flow).__name__} has no linear layer or convolution to put adapters on: tune a "
            "flow that is a network"
        )
    for target in targets or ():
        if not any(name == target or name.endswith(f".{target}") for name in known):
            raise ValueError(
                f"no linear layer or convolution of {type(flow).__name__} is named {target!r}: "
                f"there are {', '.join(known[:12])}{' ...' if len(known) > 12 else ''}; the end "
                "of a name stands for all that end so"
            )
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,  # type: ignore[arg-type]
        target_modules=list(targets or known),
        lora_dropout=dropout,
        base_model_name_or_path=flow.name or None,
    )
    tuned = _inject(flow, config)
    for name, p in tuned.adapters().items():  # as peft draws them, but from our own seed
        if ".lora_A." in name:
            bound = p[0].numel() ** -0.5
            values = torch.rand(p.shape, generator=generator(seed, name), dtype=p.dtype)
            p.data = (2 * values - 1).mul_(bound).to(p.device)
    return tuned


def merged(tuned: Adapted) -> FlowMap:
    """Return a plain flow with the adapters added to its weights, at the view's scale: a copy.

    It has no name of its own yet: `steer.load.save` makes it a model's folder.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    flow = copy.deepcopy(tuned.flow)
    named: list[tuple[str, Any]] = list(flow.named_modules())
    for name, layer in named:
        if isinstance(layer, BaseTunerLayer):
            plain: Any = layer.get_base_layer()
            with torch.no_grad():
                update = layer.get_delta_weight(tuned.adapter)  # type: ignore[attr-defined]
                plain.weight.copy_(plain.weight + tuned.scale * update)  # rounded once
            parent, _, leaf = name.rpartition(".")
            setattr(flow.get_submodule(parent), leaf, plain)
    del flow.peft_config
    flow.name = ""
    return flow
