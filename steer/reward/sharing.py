"""What rewards that see the same pictures may share: features of one backbone."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

__all__ = ["shared", "sharing"]

_SHARED: ContextVar[dict[Any, Any] | None] = ContextVar("shared", default=None)


@contextmanager
def sharing() -> Iterator[None]:
    """Let the rewards called within share what they compute of the same images: see `shared`."""
    if _SHARED.get() is not None:
        yield
        return
    token = _SHARED.set({})
    try:
        yield
    finally:
        _SHARED.reset(token)


def shared(owner: Any, images: Tensor, make: Callable[[], Tensor]) -> Tensor:
    """Return `make()`, computed once per owner and images within one `sharing()`.

    Two rewards on one backbone need the features of the same pictures; a sum of them encodes the
    pictures once. Outside of `sharing` nothing is remembered.

    Args:
        owner: what computes, say the backbone.
        images: what it computes on, the very tensor.
        make: the computation.
    """
    memory = _SHARED.get()
    if memory is None:
        return make()
    version = 0 if images.is_inference() else images._version
    key = id(owner), id(images), version, torch.is_grad_enabled()
    if key not in memory:
        memory[key] = owner, images, make()  # owner and images live on, so their ids stay theirs
    return memory[key][2]
