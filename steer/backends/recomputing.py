"""Recompute blocks of a model in the backward pass instead of keeping their activations.

If a whole call is recomputed (Chen et al. 2016, arXiv 1604.06174), the forward pass keeps one
state, and the backward pass all activations of the call at once. Block by block, the inputs of all
blocks are kept, and the backward pass has the activations of one block at a time.

Adapters are switched by the state of their layers, and this state has been reset when the backward
pass runs. So a block is recomputed with its adapters set as in its forward pass.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from steer.adapters.switch import Afresh, as_now

__all__ = ["again", "by_block", "has_blocks"]

BLOCKS = {"AutoencoderDC": "decoder.up_blocks"}
"""Models whose blocks can be recomputed although diffusers does not support it -> their blocks."""


def again(function: Callable[..., Any], module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call a function; recompute it in the backward pass with the adapters set as now.

    Args:
        function: a function of tensors.
        module: the module whose adapters it uses.
        *args: arguments of the function.
        **kwargs: likewise.
    """
    scales = as_now(module)
    return checkpoint(
        function,
        *args,
        use_reentrant=False,
        preserve_rng_state=_draws(module),  # reading the random state makes the host wait
        context_fn=lambda: (_once(function), Afresh(lambda: _once(function, scales))),
        **kwargs,
    )


@contextmanager
def _once(block: Any, scales: AbstractContextManager[None] | None = None) -> Iterator[None]:
    """Turn off the checkpointing of a block's own parts, with the adapters set as given.

    `by_block` has been left when the backward pass runs. A part that checkpointed itself only in
    the forward pass would then save other tensors in the recomputation, which PyTorch refuses.
    """
    parts = block.modules() if isinstance(block, nn.Module) else ()
    on: list[Any] = [m for m in parts if getattr(m, "gradient_checkpointing", False)]
    try:
        for m in on:
            m.gradient_checkpointing = False
        with scales or nullcontext():
            yield
    finally:
        for m in on:
            m.gradient_checkpointing = True


def _draws(module: nn.Module) -> bool:
    """Return whether a call draws random numbers."""
    return any(isinstance(m, nn.Dropout) and m.training and m.p > 0 for m in module.modules())


def has_blocks(model: nn.Module) -> bool:
    """Return whether a diffusers model can be recomputed block by block."""
    supported = getattr(model, "_supports_gradient_checkpointing", False)
    return bool(supported) or type(model).__name__ in BLOCKS


@contextmanager
def by_block(model: nn.Module) -> Iterator[None]:
    """Recompute the blocks of a model in the backward pass of the calls in this context.

    The model's own checkpointing setting is restored afterwards.

    Args:
        model: a diffusers model that `has_blocks`.
    """
    place = BLOCKS.get(type(model).__name__)
    if place is not None:
        with _wrapped(model.get_submodule(place)):
            yield
        return

    def run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        whose = function if isinstance(function, nn.Module) else model
        return again(function, whose, *args, **kwargs)

    told: list[Any] = [m for m in model.modules() if hasattr(m, "gradient_checkpointing")]
    before = [
        (m, m.gradient_checkpointing, getattr(m, "_gradient_checkpointing_func", None))
        for m in told
    ]  # fmt: skip
    try:
        for m in told:
            m.gradient_checkpointing, m._gradient_checkpointing_func = True, run
        yield
    finally:
        for m, on, function in before:
            m.gradient_checkpointing, m._gradient_checkpointing_func = on, function


@contextmanager
def _wrapped(blocks: nn.Module) -> Iterator[None]:
    """Wrap each block so that it is recomputed."""
    held = [(block, vars(block).get("forward")) for block in blocks.children()]
    try:
        for block, _ in held:
            block.forward = partial(_block, block.forward, block)
        yield
    finally:
        for block, own in held:
            del block.forward
            if own is not None:  # set by hooks of other packages
                block.forward = own


def _block(forward: Callable[..., Tensor], block: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    return again(forward, block, *args, **kwargs)
