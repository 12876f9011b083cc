"""Micro-batches: split rows into parts of bounded size, equally for all prompts, and join them.

If a device has too little memory for a part, the part is halved, and all later parts of the run
are as small: see `Ceiling`. Neither a row's result nor its noise depends on the other rows of its
call, so the pictures are the same.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor

from steer.flow import FlowMap, Wrapped
from steer.path import Time
from steer.ranks import Ranks

__all__ = ["Batched", "Ceiling", "in_batches", "in_slices", "join_rows", "too_large"]

T = TypeVar("T")


class Ceiling:
    """The largest number of rows per call for which the device had memory, within one run.

    Attributes:
        rows: the number; None: memory was never too small.
    """

    def __init__(self) -> None:
        self.rows: int | None = None
        self._told = False

    def lower(self, rows: int) -> None:
        """Lower the ceiling to this many rows, after a larger call ran out of memory."""
        self.rows = rows
        if torch.cuda.is_available():  # the failed call's memory
            torch.cuda.empty_cache()

    def tell(self, before: int) -> None:
        """Warn, once, that calls have become smaller, and how to start with smaller calls."""
        if self._told or self.rows is None:
            return
        self._told = True
        warnings.warn(
            f"out of memory at {before} rows a call: continuing with {self.rows}, which does not "
            f"change the pictures. To start with this number, give batch_size={self.rows} "
            "(--batch-size); `steer plan` shows other ways to save memory",
            stacklevel=2,
        )

    @contextmanager
    def held(self) -> Iterator[None]:
        """Use this ceiling for all micro-batches in this context."""
        token = _CEILING.set(self)
        try:
            yield
        finally:
            _CEILING.reset(token)

    @staticmethod
    def of_run() -> "Ceiling":
        """Return the ceiling of the current run; a new one outside of a run."""
        return _CEILING.get() or Ceiling()


_CEILING: ContextVar[Ceiling | None] = ContextVar("ceiling", default=None)


def in_batches(f: Callable[[Tensor], T], x: Tensor, size: int | None, prompts: int = 1) -> list[T]:
    """Apply `f` to parts of at most `size` rows, as many rows (at least one) of every prompt.

    Args:
        f: the function, called on the parts in order.
        x: rows, prompt-major, (p * n, ...).
        size: maximum number of rows in a part; None: all at once.
        prompts: p.

    Raises:
        torch.OutOfMemoryError: one row of every prompt is too much.
    """
    n = len(x) // prompts

    def part(a: int, b: int) -> T:
        return f(x if b - a == n else x.unflatten(0, (prompts, n))[:, a:b].flatten(0, 1))

    return _parts(part, n, size, prompts)


def in_slices(f: Callable[[slice], T], rows: int, size: int | None) -> list[T]:
    """Apply `f` to slices of at most `size` rows, smaller ones if memory is too small.

    >>> in_slices(lambda rows: (rows.start, rows.stop), 5, 2)
    [(0, 2), (2, 4), (4, 5)]

    Args:
        f: the function, called on the parts in order.
        rows: number of rows.
        size: maximum number of rows in a slice; None: all at once.
    """
    return _parts(lambda a, b: f(slice(a, b)), rows, size, 1)


def _parts(f: Callable[[int, int], T], n: int, size: int | None, prompts: int) -> list[T]:
    """Apply `f` to parts (first, last) of n rows per prompt; each process takes its own rows."""
    ranks = Ranks.of_run()
    if ranks is None:
        return _own_parts(f, 0, n, size, prompts)

    def own(first: int, last: int) -> T:
        found: Any = _own_parts(f, first, last, size, prompts)
        if isinstance(found[0], Tensor):
            return join_rows(found, prompts)  # type: ignore[return-value]
        return found[0].map(lambda *v: join_rows(v, prompts), *found[1:])

    return ranks.each(own, n, prompts)


def _own_parts(
    f: Callable[[int, int], T], first: int, last: int, size: int | None, prompts: int
) -> list[T]:
    """Apply `f` to rows from first to last, halving them if memory is too small."""
    ceiling = Ceiling.of_run()
    found: list[T] = []
    failed = 0
    while first < last or not found:
        bounds = [rows // prompts for rows in (size, ceiling.rows) if rows is not None]
        m = max(1, min([last - first, *bounds]))
        lower = False
        try:
            found.append(f(first, min(last, first + m)))
        except RuntimeError as error:
            if m == 1 or not too_large(error):
                raise
            lower = True  # continue below: here the failed call's tensors are still alive
        if lower:
            failed = failed or m * prompts
            ceiling.lower(m // 2 * prompts)
        else:
            first += m
            if failed:
                ceiling.tell(failed)
    return found


def too_large(error: RuntimeError) -> bool:
    """Return whether fewer rows help: out of memory, or a kernel that indexes with 32 bits."""
    return isinstance(error, torch.OutOfMemoryError) or "INT_MAX" in str(error)


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
        size: maximum number of rows in one network call, but at least one of each prompt; None:
            all.
        prompts: number of prompts that its rows belong to.
    """

    def __init__(self, flow: FlowMap, size: int | None, prompts: int = 1) -> None:
        super().__init__(flow)
        self.size, self.prompts = size, prompts

    def _apply_to(self, f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return join_rows(in_batches(f, x, self.size, self.prompts), self.prompts)

    def call(self, name: str, x: Tensor, *times: Time) -> Tensor:
        """Call the inner flow part by part; all rows have the same time."""
        return self._apply_to(lambda part: getattr(self.flow, name)(part, *times), x)

    def decode(self, x: Tensor) -> Tensor:
        """Return the flow's images."""
        return self._apply_to(self.flow.decode, x)
