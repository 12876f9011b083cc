"""The units of a sharded denoiser: modules whose weights are gathered together."""

from collections.abc import Iterator

from torch import nn

from steer.flow import FlowMap

__all__ = ["split_bytes", "units"]

LISTS = nn.ModuleList, nn.ModuleDict

LARGE = 0.1
"""A unit with more than this fraction of the denoiser's values is split into its blocks."""


def units(flow: FlowMap) -> list[nn.Module]:
    """Return the modules whose weights are gathered together, inner ones first.

    Units are blocks, which are the members of a list of modules. A block that holds more than a
    tenth of the values is itself split into its blocks. For a pipeline, the denoiser is the unit
    of the remaining weights. Parts of other denoisers may be called from outside: there the parts
    are units, and weights outside of them are not sharded.

    Args:
        flow: its denoiser is called by `forward`, or its parts are.
    """
    denoiser = flow.denoiser
    most = LARGE * sum(p.numel() for p in denoiser.parameters())
    if flow.component:
        return [*_blocks(denoiser, most), denoiser]
    parts = [c for c in denoiser.children() if not isinstance(c, LISTS)]
    return [*_blocks(denoiser, most), *(c for c in parts if any(True for _ in c.parameters()))]


def _blocks(module: nn.Module, most: float) -> Iterator[nn.Module]:
    """Yield blocks, inner ones first, as `fully_shard` needs them."""
    listed = isinstance(module, LISTS)
    for child in module.children():
        size = sum(p.numel() for p in child.parameters())
        block = listed and not isinstance(child, LISTS)
        if not block or size > most:
            yield from _blocks(child, most)
        if block and size:
            yield child


def split_bytes(flow: FlowMap, processes: int) -> tuple[int, int]:
    """Return the bytes of a denoiser's weights, and how many of them each process holds.

    A process holds 1/`processes` of the sharded weights, all other weights, and the two largest
    units as a whole: the one that is called, and the next one, which is gathered meanwhile.

    Args:
        flow: without adapters.
        processes: number of processes.
    """
    seen: set[int] = set()
    sizes = []
    for unit in units(flow):
        own = [p for p in unit.parameters() if id(p) not in seen]
        seen |= {id(p) for p in own}
        sizes.append(sum(p.numel() * p.element_size() for p in own))
    every = [*flow.denoiser.parameters(), *flow.denoiser.buffers()]
    whole = sum(t.numel() * t.element_size() for t in {id(t): t for t in every}.values())
    split = sum(sizes)
    return whole, whole - split + -(-split // processes) + sum(sorted(sizes)[-2:])
