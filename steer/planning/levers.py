"""Options that save memory, and how much: the guided step with each of them changed."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from steer.planning.report import Lever
from steer.planning.steps import Need, need
from steer.planning.subject import Subject

__all__ = ["levers_of"]

HALF: dict[str, Any] = {"guide_size": 0.5}
SAVING: dict[str, Any] = {"checkpointing": True}


def levers_of(
    made: Callable[..., Subject],
    peak: Callable[[Subject, int], int],
    guided: Need,
    options: Mapping[str, Any],
    alone: bool = True,
) -> tuple[list[Lever], list[Lever]]:
    """Return the effect of each memory option alone, and of those added one by one for a card.

    Args:
        made: the model with further options.
        peak: peak of a guided step, by number of rows.
        guided: the need of the step without further options.
        options: options of the model, as given.
        alone: whether to try also the options that no card needs.
    """
    one = made()
    singles: list[Lever] = []
    stack = [Lever("", "", guided)]

    def tried(first: int = 1, **more: Any) -> Need:
        which = made(**more)
        return need(lambda rows: peak(which, rows), first)

    def put(name: str, how: str, single: Need, stacked: Need) -> None:
        singles.append(Lever(name, how, single))
        stack.append(Lever(name, how, stacked))

    texts, here = one.beside, guided
    if texts:
        here = guided.more(-texts)
        put("text encoders dropped", "flow.release_text_encoders(), prompts bound", here, here)
    if hasattr(one.flow, "pipe"):
        saving = bool(options.get("checkpointing"))
        if not saving:
            found = tried(**SAVING)
            here = found.more(-texts)
            put("checkpointing", "checkpointing=True", found, here)
        single = tried(**HALF) if alone and not saving else None
        here = tried(**SAVING, **HALF).more(-texts)
        put("half-size pictures for the gradient", "guide_size=0.5", single or here, here)
        if one.dtype in (torch.bfloat16, torch.float16):
            single, here = guided.more(_of_8_bits(one, saving)), here.more(_of_8_bits(one, True))
            put("8-bit weights of the denoiser", "an int8 or fp8 checkpoint", single, here)
        if alone:
            name = "one row per decoder call, from 2 rows on"
            singles.append(Lever(name, "decode_rows=1", tried(2, decode_rows=1)))
            tiny = _tiny(one)
            if tiny is not None:
                name = "a tiny autoencoder for the gradient"
                singles.append(Lever(name, "guide_vae=...", tried(guide_vae=tiny)))
    if alone:
        singles.append(
            Lever(
                "weights with requires_grad", "never used: they are frozen", _unfrozen(one, peak)
            )
        )
    return singles, stack


def _of_8_bits(one: Subject, checkpointing: bool) -> int:
    """Return how many more bytes 8-bit weights need than 16-bit weights.

    A matrix product converts them to 16 bits, and its backward pass keeps these: all of them while
    a graph is alive, those of one block if blocks are recomputed.
    """
    network = one.flow.denoiser
    whole = _bytes(network)
    blocks = [
        _bytes(block) for m in network.modules() if isinstance(m, nn.ModuleList) for block in m
    ]
    kept = max(blocks, default=whole) if checkpointing else whole
    return kept - whole // 2


def _bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def _tiny(one: Subject) -> Any:
    """Return a tiny autoencoder without values for these latents, if one could exist."""
    from steer.backends.outline import tiny_autoencoder

    return tiny_autoencoder(one.flow, one.mode, one.dtype)


def _unfrozen(one: Subject, peak: Callable[[Subject, int], int]) -> Need:
    parts = list(one.flow.parameters())
    for p in parts:
        p.requires_grad_(True)
    try:
        return need(lambda rows: peak(one, rows))
    finally:
        for p in parts:
            p.requires_grad_(False)
