"""The parts of a denoiser whose weights are gathered together where it is split over processes."""

from collections.abc import Iterator

from torch import nn

from steer.flow import FlowMap

__all__ = ["split_bytes", "units"]

LISTS = nn.ModuleList, nn.ModuleDict

LARGE = 0.1
"""A unit with more than this share of the denoiser's values is split into its own blocks."""


def units(flow: FlowMap) -> list[nn.Module]:
    """Return the modules whose weights are gathered together, the inner ones first.

    They are blocks, the members of a list of modules, one that holds more than a tenth of the
    values being split into blocks of its own as well, and the denoiser of a pipeline for what is
    left. A denoiser of another kind may have its parts called from outside: there its parts are
    units, and what it holds beside them stays whole.

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
    """Give blocks, the inner ones first, as `fully_shard` wants them."""
    listed = isinstance(module, LISTS)
    for child in module.children():
        size = sum(p.numel() for p in child.parameters())
        block = listed and not isinstance(child, LISTS)
        if not block or size > most:
            yield from _blocks(child, most)
        if block and size:
            yield child


def split_bytes(flow: FlowMap, processes: int) -> tuple[int, int]:
    """Return the bytes of a denoiser's weights, and what each of some processes has of them.

    That is one part in `processes` of what is split, all of what is not, and the two largest units
    whole: the one that is called, and the next one, which is gathered meanwhile.

    Args:
        flow: without adapters.
        processes: N.
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
