"""Micro-batches: rows in parts of a bounded size, as many of every prompt, and joined again."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from steer.flow import FlowMap, Wrapped
from steer.path import Time

__all__ = ["Batched", "in_batches", "join_rows"]

T = TypeVar("T")


def in_batches(f: Callable[[Tensor], T], x: Tensor, size: int | None, prompts: int = 1) -> list[T]:
    """Apply `f` to parts of at most `size` rows, as many rows (at least one) of every prompt.

    Args:
        f: what is applied, in order.
        x: rows, prompt-major, (p * n, ...).
        size: the most rows of a part; None: all at once.
        prompts: p.
    """
    n = len(x) // prompts
    m = n if size is None else max(1, size // prompts)
    if n <= m:
        return [f(x)]
    grouped = x.unflatten(0, (prompts, n))
    return [f(grouped[:, a : a + m].flatten(0, 1)) for a in range(0, n, m)]


def join_rows(parts: Sequence[Tensor], prompts: int = 1) -> Tensor:
    """Put the parts of `in_batches` together again, prompt-major.

    >>> join_rows([torch.tensor([0, 2]), torch.tensor([1, 3])], prompts=2)
    tensor([0, 1, 2, 3])
    """
    if len(parts) == 1:
        return parts[0]
    return torch.cat([p.unflatten(0, (prompts, -1)) for p in parts], 1).flatten(0, 1)


class Batched(Wrapped):
    """A flow in micro-batches.

    Args:
        flow: the flow, prompts already bound.
        size: the most rows in one network call, but never less than one of each prompt; None: all.
        prompts: how many prompts its rows belong to.
    """

    def __init__(self, flow: FlowMap, size: int | None, prompts: int = 1) -> None:
        super().__init__(flow)
        self.size, self.prompts = size, prompts

    def _apply_to(self, f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return join_rows(in_batches(f, x, self.size, self.prompts), self.prompts)

    def call(self, name: str, x: Tensor, *times: Time) -> Tensor:
        """Call the flow inside on part after part; one time for all rows."""
        return self._apply_to(lambda part: getattr(self.flow, name)(part, *times), x)

    def decode(self, x: Tensor) -> Tensor:
        """Return the flow's images."""
        return self._apply_to(self.flow.decode, x)
