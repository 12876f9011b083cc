"""Share computations between rewards of the same pictures: features of one backbone."""

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
    """Let rewards share computations on the same images in this context; see `shared`."""
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

    Two rewards on one backbone need the same features of a picture, so a sum of them encodes each
    picture only once. Outside of `sharing` nothing is cached.

    Args:
        owner: the object that computes, for example the backbone.
        images: the tensor that it computes on (compared by identity).
        make: the computation.
    """
    memory = _SHARED.get()
    if memory is None:
        return make()
    version = 0 if images.is_inference() else images._version
    key = id(owner), id(images), version, torch.is_grad_enabled()
    if key not in memory:
        memory[key] = owner, images, make()  # both stay alive, so ids stay valid
    return memory[key][2]
