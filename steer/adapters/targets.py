"""Which layers of a flow's denoiser can have adapters."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from steer.flow import FlowMap, device_of

__all__ = ["Targets", "chosen", "ends", "matches", "name_of_denoiser", "plain_name", "targets"]

KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)

GROUPED = "grouped convolutions, whose adapters cannot be added to their weights"
PROJECTIONS = (
    "projections of nn.MultiheadAttention, which reads their weights and never calls them"
)


@dataclass(frozen=True)
class Targets:
    """The layers of a flow that can have adapters; all names are those in the flow.

    Attributes:
        names: linear layers and convolutions of the denoiser that can have adapters.
        left_out: layers of the denoiser without adapters by default: reason -> names.
        inside: all modules of the denoiser.
        beside: the outermost modules that are not part of the denoiser.
    """

    names: tuple[str, ...]
    left_out: Mapping[str, tuple[str, ...]]
    inside: tuple[str, ...]
    beside: tuple[nn.Module, ...]

    def __str__(self) -> str:
        return "; ".join(f"{len(names)} {why}" for why, names in self.left_out.items())


def targets(flow: FlowMap) -> Targets:
    """Return which layers of a flow's denoiser can have adapters, and which are left out.

    A layer that occurs twice in the flow is named by the first occurrence, where peft adapts it.

    Raises:
        ValueError: the flow's `denoiser` is not a submodule of it.
    """
    within = {id(m) for part in _parts(flow) for m in part.modules()}
    attention = [m for m in flow.modules() if isinstance(m, nn.MultiheadAttention)]
    projections = {id(m) for a in attention for m in a.modules()}
    names: list[str] = []
    left_out: dict[str, list[str]] = {}
    inside = [name for name, m in flow.named_modules() if name and id(m) in within]
    for name in inside:
        m = flow.get_submodule(name)
        if not isinstance(m, KINDS):
            continue
        if id(m) in projections:
            left_out.setdefault(PROJECTIONS, []).append(name)
        elif getattr(m, "groups", 1) > 1:
            left_out.setdefault(GROUPED, []).append(name)
        else:
            names.append(name)
    said = {why: tuple(some) for why, some in left_out.items()}
    return Targets(tuple(names), said, tuple(inside), tuple(_beside(flow, within)))


def _beside(module: nn.Module, within: set[int]) -> Iterator[nn.Module]:
    for child in module.children():
        if within.isdisjoint(id(m) for m in child.modules()):
            yield child
        elif id(child) not in within:
            yield from _beside(child, within)


def name_of_denoiser(flow: FlowMap) -> str:
    """Return the name of a flow's denoiser within the flow; "" if it is the flow itself."""
    said = flow.denoiser
    return next(plain_name(name) for name, m in flow.named_modules() if m is said)


def plain_name(name: str) -> str:
    """Return a name without the prefix of `torch.compile`'s wrapper module.

    >>> plain_name("network._orig_mod.stem")
    'network.stem'
    """
    return name.replace("_orig_mod.", "")


def ends(name: str) -> Iterator[str]:
    """Yield the names by which a layer may be selected: its name, and its ends after a dot.

    >>> list(ends("up.0.conv"))
    ['up.0.conv', '0.conv', 'conv']
    """
    name = plain_name(name)
    while name:
        yield name
        name = name.partition(".")[2]


def matches(name: str, wanted: Collection[str]) -> bool:
    """Return whether one of the names is a layer's name, or its end after a dot.

    >>> matches("up.0.conv", ["0.conv"]), matches("up.0.conv", ["nv", "up"])
    (True, False)
    """
    return any(end in wanted for end in ends(name))


def chosen(flow: FlowMap, found: Targets, wanted: Sequence[str], rank: int) -> list[str]:
    """Return the names of the layers that are selected by name, or by the end of a name.

    A selected grouped convolution gets adapters if the rank is a multiple of its groups. The flow
    can then be tuned and saved, but not merged.

    Raises:
        ValueError: a name that matches no layer, or only layers that cannot have adapters.
    """
    kind = type(flow).__name__
    taken = list(found.names)
    for name in found.left_out.get(GROUPED, ()):
        layer: nn.Conv2d = flow.get_submodule(name)  # type: ignore[assignment]
        if rank % layer.groups == 0:
            taken.append(name)
    for target in wanted:
        if any(matches(name, [target]) for name in taken):
            continue
        for why, names in found.left_out.items():
            unfit = [name for name in names if matches(name, [target])]
            if unfit:
                mend = "take a rank that is a multiple of its groups, or " * (why is GROUPED)
                raise ValueError(
                    f"{unfit[0]} of {kind} cannot have adapters of rank {rank}: it is one of the "
                    f"{why}: {mend}leave {target!r} out of the targets"
                )
        raise ValueError(
            f"no linear layer or convolution of {kind}'s denoiser is named {target!r}: there are "
            f"{', '.join(taken[:12])}{' ...' if len(taken) > 12 else ''}; the end of a name "
            "selects all names that end with it"
        )
    return [name for name in found.inside if name in taken and matches(name, wanted)]


def _parts(flow: FlowMap) -> list[nn.Module]:
    """Return the modules that velocity and jump call: as declared by the flow, or as observed."""
    said = flow.denoiser
    if not any(m is said for m in flow.modules()):
        raise ValueError(
            f"the denoiser of {type(flow).__name__} is not a submodule of it, so its adapters "
            "would not be found: assign the module to an attribute of the flow, self.network = ..."
        )
    if not isinstance(said, FlowMap) or all(
        getattr(type(said), name) is getattr(FlowMap, name)
        for name in ("decode", "encode", "given")
    ):
        return [said]
    called = _called(said)
    parts = [c for c in said.children() if not called.isdisjoint(id(m) for m in c.modules())]
    return parts or [said]


def _called(flow: FlowMap) -> set[int]:
    """Return the ids of the modules that velocity and jump call; none if one of them fails.

    They are called at zeros in evaluation mode, so that the flow does not change.
    """
    found: set[int] = set()
    modes = [(m, m.training) for m in flow.modules()]
    some = next((p for p in flow.parameters() if p.is_floating_point()), torch.zeros(()))
    x = torch.zeros(1, *flow.event_shape, device=device_of(flow), dtype=some.dtype)
    hook = register_module_forward_pre_hook(lambda m, _: found.add(id(m)))
    try:
        with suppress(Exception), torch.no_grad(), torch.random.fork_rng(devices=[]):
            for m, _ in modes:
                m.training = False
            flow.velocity(x, 0.5)
            flow.jump(x, 0.25, 0.75)
            return found
    finally:
        hook.remove()
        for m, training in modes:
            m.training = training
    return set()
