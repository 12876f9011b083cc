"""Put adapters on a copy of a flow's modules that shares its tensors; the flow is not changed."""

import copy
import warnings
from collections.abc import Collection, Iterator, Sequence
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from steer.adapters.compiling import compile_again
from steer.adapters.lora import DEFAULT, Adapted, at_least_single
from steer.adapters.switch import Switch
from steer.adapters.targets import Targets, chosen, matches, plain_name
from steer.adapters.targets import targets as find
from steer.flow import FlowMap, device_of
from steer.noise import generator

__all__ = ["adapt", "inject", "refuse_adapted", "rejoin", "twin"]


def adapt(
    flow: FlowMap,
    rank: int = 16,
    alpha: float | None = None,
    *,
    targets: Sequence[str] | None = None,
    dropout: float = 0.0,
    seed: int = 0,
) -> Adapted:
    """Put new adapters on a flow's denoiser; the result shares the flow's tensors.

    The denoiser's modules are new ones; other modules (a decoder, a text encoder) are the flow's
    own. The adapters are in float32 (float64 for a float64 flow), and require no gradient until a
    trainer enables it: `for p in tuned.adapters().values(): p.requires_grad_()`.

    Args:
        flow: any flow with linear layers or convolutions; it is not changed.
        rank: r.
        alpha: the update is scaled by alpha / r. Default: 2 r.
        targets: names of layers of the denoiser, or the ends of their names. Default: every linear
            layer and convolution of it that can be adapted; a warning lists those that are left
            out, see `steer.adapters.targets.targets(flow)`.
        dropout: fraction of the adapters' inputs that is dropped in training.
        seed: fixes A; B is zero.

    Raises:
        ValueError: the denoiser has no such layer, or one that cannot have adapters; the flow has
            adapters already; a rank below one.
    """
    from peft import LoraConfig

    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    refuse_adapted(flow)
    found = find(flow)
    if targets is None:
        own = flow.adapter_targets
        targets = [end for end in own if any(matches(n, [end]) for n in found.names)] or None
    names = chosen(flow, found, targets, rank) if targets else _default(found)
    if not names:
        raise ValueError(
            f"{type(flow).__name__} has no linear layer or convolution to put adapters on: tune a "
            "flow that is a network"
        )
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,  # type: ignore[arg-type]
        target_modules=list(targets or names),
        lora_dropout=dropout,
        base_model_name_or_path=flow.name or None,
    )
    tuned = inject(flow, config, names, found.beside)
    for name, p in tuned.adapters().items():  # with peft's distribution, but from our own seed
        if ".lora_A." in name:
            bound = p[0].numel() ** -0.5
            values = torch.rand(
                p.shape, generator=generator(seed, plain_name(name)), dtype=p.dtype
            )
            p.data = (2 * values - 1).mul_(bound).to(p.device)
    return tuned


def _default(found: Targets) -> Sequence[str]:
    """Return the layers that can have adapters, and warn about the others."""
    if found.left_out:
        warnings.warn(
            f"without adapters: {found} (steer.adapters.targets.targets(flow) names them)",
            stacklevel=3,
        )
    return found.names


def inject(
    flow: FlowMap, config: Any, names: Collection[str], shared: Sequence[nn.Module] = ()
) -> Adapted:
    """Put adapters on these layers, on new modules that share the flow's tensors.

    Args:
        flow: the base, which is not changed.
        config: peft's configuration of a LoRA.
        names: names of the layers in the flow.
        shared: modules that both flows share unchanged.

    Raises:
        ValueError: peft cannot adapt one of them.
    """
    from peft import inject_adapter_in_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    copied = twin(flow, shared)
    modes = {name: m.training for name, m in copied.named_modules()}
    asks = {p: p.requires_grad for m in shared for p in m.parameters()}
    config.exclude_modules = None  # `names` selects the layers
    keys: dict[str, Any] = {f"{name}.lora_A.weight": None for name in names}
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # peft uses the global generator, and warns that other layers have similar names
        warnings.simplefilter("ignore", RuntimeWarning)
        inject_adapter_in_model(config, copied, DEFAULT, state_dict=keys)
    for p in copied.parameters():
        p.requires_grad_(asks.get(p, False))
    others = [n for n in modes if matches(n, config.target_modules) and n not in names]
    config.exclude_modules = others or None  # needed by peft when it reads our files
    compile_again(copied)
    layers = [m for m in copied.modules() if isinstance(m, BaseTunerLayer)]
    if any(isinstance(m.get_base_layer(), nn.MultiheadAttention) for m in layers):
        raise ValueError(
            "peft's adapters on a whole nn.MultiheadAttention write into its weights, which are "
            "the base's, at each call: name linear layers and convolutions"
        )
    tuned = Adapted(copied, Switch(copied, layers, shared))
    tuned.train(flow.training)
    for name, m in copied.named_modules():
        m.training = modes.get(name.replace(".base_layer", ""), flow.training)
    for p in tuned.adapters().values():
        p.data = p.data.to(at_least_single(p.dtype))
    return tuned


def refuse_adapted(flow: FlowMap) -> None:
    """Raise an error if a flow already has adapters.

    Raises:
        ValueError: it has.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    if any(isinstance(m, BaseTunerLayer) for m in flow.modules()):
        raise ValueError(
            "the flow has adapters already: use the flow without them, or add them to its weights "
            "first with steer.lora.merged"
        )


def twin(flow: FlowMap, shared: Sequence[nn.Module], own: bool = False) -> FlowMap:
    """Return a flow with new modules, on which adapters can be put without touching the flow.

    Args:
        flow: the flow.
        shared: modules that both flows share; see `steer.adapters.targets.Targets`.
        own: whether the new modules get their own tensors, too. Default: they share the flow's,
            frozen.
    """
    kept = {id(m): m for part in shared for m in part.modules()}
    kept |= {id(m): m for m in _hidden(flow)}
    memo: dict[int, Any] = dict(kept)
    memo |= {id(t): t for m in kept.values() for t in [*m.parameters(), *m.buffers()]}
    if not own:
        for module in flow.modules():
            if id(module) not in kept:
                for tensor in _tensors(module):
                    same = tensor.detach()
                    parameter = isinstance(tensor, nn.Parameter)
                    memo[id(tensor)] = nn.Parameter(same, False) if parameter else same
    return copy.deepcopy(flow, memo)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """Yield a module's own tensors, and those that its hooks compute (old weight norm)."""
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)
    yield from (v for v in vars(module).values() if isinstance(v, Tensor) and not v.is_leaf)


def _hidden(flow: FlowMap) -> list[nn.Module]:
    """Return modules that a flow holds without registering them, in lists or in a pipeline."""
    seen = {id(m) for m in flow.modules()}
    torchs = vars(nn.Module()).keys()
    own = [vars(m) for m in flow.modules() if isinstance(m, FlowMap)]
    waiting: list[Any] = [v for d in own for k, v in d.items() if k not in torchs]
    registered, found = frozenset(seen), []
    while waiting:
        value = waiting.pop()
        if id(value) in seen or isinstance(value, Tensor | type | FunctionType | ModuleType):
            continue
        seen.add(id(value))
        if isinstance(value, nn.Module):
            if registered.isdisjoint(id(m) for m in value.modules()):
                found.append(value)
        elif isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list | tuple | set | frozenset):
            waiting += value
        elif hasattr(value, "__dict__"):
            waiting += vars(value).values()
    return found


def rejoin(tuned: Adapted, flow: FlowMap) -> None:
    """Put a tuned flow back on its base's tensors and device if it was moved.

    Modules other than the denoiser belong to both flows and were moved for both; they are moved to
    the device of the base's denoiser.

    Args:
        tuned: adapters on a twin of `flow`.
        flow: the base.
    """
    own = dict(flow.named_parameters()) | dict(flow.named_buffers())
    shared = {id(t) for m in tuned.switch.shared for t in [*m.parameters(), *m.buffers()]}
    device = device_of(flow.denoiser)
    twins = [*tuned.flow.named_parameters(), *tuned.flow.named_buffers()]
    for name, tensor in twins:
        base = own.get(name.replace("base_layer.", ""))
        moved = base is None or id(tensor) in shared
        tensor.data = tensor.data.to(device) if moved else base.data  # type: ignore[union-attr]
