"""Compile the repeated blocks of a denoiser: one graph for all blocks of a kind.

A transformer's blocks differ only in their weights, so `torch.compile` makes one graph for all of
them, in a fraction of the time that the whole network would take. Changes within a run do not
cause a recompilation: steps, times and prompts are tensors, and the scale of adapters is made a
tensor, too (see `Switch.traced`). There is a separate graph for adapters off and on (by their
name), for gradients off and on, and for a second size of a tensor; after that, sizes are dynamic.
"""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from steer.flow import FlowMap

__all__ = ["compile_again", "compile_blocks", "is_compiled"]

LISTS = nn.ModuleList, nn.ModuleDict, nn.Sequential

GRAPHS = 64
"""Maximum number of graphs for one kind of block before torch stops compiling (its default: 8)."""


def compile_blocks(flow: FlowMap, backend: bool | str = True) -> None:
    """Compile the repeated blocks of a flow's denoiser, in place; nothing is run at this point.

    Args:
        flow: a flow; the pipeline's own calls are then compiled, too, since it has the same
            modules.
        backend: backend of `torch.compile`; True: its default.

    Raises:
        ValueError: a denoiser without repeated blocks, or one that is offloaded.
    """
    if "gradient" in flow.lacks and "offloaded" in flow.lacks["gradient"]:
        raise ValueError(
            f"compile needs the weights to stay where they are, and {flow.lacks['gradient']}"
        )
    blocks = _repeated(flow.denoiser)
    if not blocks:
        raise ValueError(
            f"compile makes one graph for the blocks that a network repeats, and "
            f"{type(flow.denoiser).__name__} has none in a ModuleList: leave compile out, or "
            "compile what is called yourself, with torch.compile"
        )
    for block in blocks:
        vars(block)["compiled_by"] = backend
        _compile(block)


def compile_again(module: nn.Module) -> bool:
    """Compile the blocks of a copy that were compiled in the original; return whether any were."""
    found = [m for m in module.modules() if "compiled_by" in vars(m)]
    for block in found:
        _compile(block)
    return bool(found)


def is_compiled(flow: FlowMap) -> bool:
    """Return whether any block of a flow's denoiser is compiled."""
    return any("compiled_by" in vars(m) for m in flow.denoiser.modules())


def _compile(block: nn.Module) -> None:
    backend = vars(block)["compiled_by"]
    options: dict[str, Any] = {} if backend is True else {"backend": backend}
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        options["recompile_limit"] = GRAPHS
    block.compile(**options)


def _repeated(denoiser: nn.Module) -> list[nn.Module]:
    """Return a denoiser's repeated blocks: those that diffusers names, or those in its lists."""
    named = frozenset(getattr(denoiser, "_repeated_blocks", None) or ())
    if named:
        return [m for m in denoiser.modules() if type(m).__name__ in named]
    return list(_listed(denoiser))


def _listed(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the outermost members of module lists that have weights and submodules."""
    for child in module.children():
        whole = any(True for _ in child.children()) and any(True for _ in child.parameters())
        if isinstance(module, nn.ModuleList) and not isinstance(child, LISTS) and whole:
            yield child
        else:
            yield from _listed(child)
