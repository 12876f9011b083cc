"""Several processes for one population: each calls the network for its share of the particles.

All processes hold the whole population, use the same keyed noise and make the same run. For
network and reward calls each process computes only its own particles, and the results are
gathered. So every sampler normalises weights and resamples over all particles, and all processes
return the same result.
"""

from collections.abc import Callable
from contextvars import ContextVar
from fractions import Fraction
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from steer.names import reason

__all__ = ["Fabric", "Ranks", "counted", "idle"]

T = TypeVar("T")


class Fabric(Protocol):
    """The interface that is needed of a launched `lightning.fabric.Fabric`."""

    @property
    def global_rank(self) -> int:
        """The index of this process."""

    @property
    def world_size(self) -> int:
        """The number of processes."""

    @property
    def device(self) -> torch.device:
        """The device of this process."""

    def all_gather(self, data: Any) -> Any:
        """Gather a tensor from all processes, (world_size, ...)."""


class Ranks:
    """The processes that a population is spread over.

    Inside `with Ranks(fabric):` all methods of `steer.METHODS` call the network and the reward
    only for this process's particles: `n` particles of a prompt over `k` processes are `n / k`
    rows per call, and one more for some processes if k does not divide n. All processes repeat
    everything else, which is only arithmetic on states. A process holds the states and pictures of
    all particles, and the graph of its own ones. Calls outside of micro-batches (an inversion) are
    repeated by every process.

        fabric = lightning.Fabric(devices=4)
        fabric.launch()
        with steer.Ranks(fabric):
            result = steer.sample(flow.to(fabric.device), reward, "a fox", particles=32)

    All processes must make the same calls with the same arguments; call `population.keep` in each
    of them. As with micro-batches, a call with fewer rows may round differently; calls with the
    same rows are equal bit for bit.

    Args:
        fabric: launched, on devices of one kind.

    Raises:
        ConnectionError: another process has ended.
        RuntimeError: the processes did not make the same run; this is checked when a result is
            collected.
    """

    def __init__(self, fabric: Fabric) -> None:
        self.fabric = fabric
        self.rank, self.count = fabric.global_rank, fabric.world_size
        self._tokens: list[Any] = []

    def __enter__(self) -> "Ranks":
        self._tokens.append(_RANKS.set(self))
        return self

    def __exit__(self, *_: object) -> None:
        _RANKS.reset(self._tokens.pop())

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return self.fabric.device

    @staticmethod
    def of_run() -> "Ranks | None":
        """Return the processes of the current run, if there are several.

        None within a share, which belongs to this process only.
        """
        ranks = _RANKS.get()
        several = ranks is not None and ranks.count > 1 and _SHARE.get() is None
        return ranks if several else None

    def bounds(self, n: int, rank: int | None = None) -> tuple[int, int]:
        """Return the first of a process's n rows and one past its last; equal if it has none."""
        rank = self.rank if rank is None else rank
        return rank * n // self.count, (rank + 1) * n // self.count

    def each(self, f: Callable[[int, int], T], n: int, prompts: int) -> list[T]:
        """Call `f(first, last)` for this process's rows of n; return the results of all processes.

        Args:
            f: returns a tensor, or an object with tensors and a `map` like `Evaluation`: rows of
                the prompts, prompt-major, (p * (last - first), ...).
            n: rows of each prompt.
            prompts: p.

        Returns:
            The parts, in order of their rows.
        """
        first, last = self.bounds(n)
        spare = first == last  # more processes than rows: its result is not used
        if spare:
            first, last = (n - 1, n) if n else (0, 0)
        token = _SHARE.set(Share(Fraction(n, max(1, last - first)), spare))
        try:
            found = f(first, last)
        finally:
            _SHARE.reset(token)
        most = -(-n // self.count)

        def gather(values: Tensor) -> list[Tensor]:
            return self._gathered(values, prompts, most, n)

        if isinstance(found, Tensor):
            return gather(found)  # type: ignore[return-value]
        columns: list[list[Tensor]] = []

        def column(values: Tensor) -> Tensor:
            columns.append(gather(values))
            return values

        found.map(column)  # type: ignore[attr-defined]

        def part(i: int) -> T:
            fields = iter(columns)
            return found.map(lambda _: next(fields)[i])  # type: ignore[attr-defined]

        return [part(i) for i in range(len(columns[0]))]

    def _gathered(self, values: Tensor, prompts: int, most: int, n: int) -> list[Tensor]:
        """Gather the rows of each process, without padding."""
        if values.requires_grad:
            raise RuntimeError(
                "gradients do not pass from one process to another: take them where the network "
                "is called, as potentials do, or sample in one process"
            )
        own = values.unflatten(0, (prompts, -1)) if len(values) else values
        missing = most - own.shape[1]
        if missing:
            own = torch.cat([own, own[:, -1:].expand(-1, missing, *own.shape[2:])], 1)
        every = self._all(own.contiguous())
        sizes = [last - first for first, last in (self.bounds(n, r) for r in range(self.count))]
        return [every[r][:, :m].flatten(0, 1) for r, m in enumerate(sizes) if m]

    def _all(self, values: Tensor) -> Tensor:
        """Gather the tensors of all processes, (k, ...)."""
        try:
            return self.fabric.all_gather(values)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise ConnectionError(
                f"another of the {self.count} processes of this run has ended, or cannot be "
                "reached, so this one ends too: see its messages. Finished parts of the run are "
                f"kept: the same command resumes from there ({reason(error)})"
            ) from error

    def total(self, value: Tensor) -> Tensor:
        """Return the sum over processes of a number that each has counted for its own rows."""
        return self._all(value.reshape(1)).sum()

    def agree(self, *values: Tensor) -> None:
        """Make sure that all processes hold the same tensors.

        Raises:
            RuntimeError: they do not.
        """
        sums = torch.stack([_sum(v) for v in values])
        every = self._all(sums)
        if bool((every != every[:1]).any()):
            raise RuntimeError(
                f"{self.count} processes did not make the same run, so their pictures are not "
                "reliable: all must be called with the same arguments, by the same versions, on "
                "devices of one kind; or spread prompts over them instead (--spread prompts)"
            )


def _sum(values: Tensor) -> Tensor:
    """Return a checksum of a tensor's bytes, which does not depend on the order of summation."""
    data = values.detach().reshape(-1).contiguous().view(torch.uint8).long()
    places = torch.arange(len(data), device=data.device) % 65521 + 1
    return (data * places).sum()


class Share:
    """The share of a call's rows that a process computes.

    Args:
        whole: ratio of all rows to its own.
        spare: whether other processes compute the same rows, so that its calls do not count.
    """

    def __init__(self, whole: Fraction, spare: bool) -> None:
        self.whole, self.spare = whole, spare


_RANKS: ContextVar[Ranks | None] = ContextVar("ranks", default=None)
_SHARE: ContextVar[Share | None] = ContextVar("share", default=None)


def counted(rows: int) -> Any:
    """Return how many rows a call counts as: those of all processes, if this one calls its share.

    It is an exact fraction: summed over the micro-batches of a call it gives its whole number of
    rows.
    """
    share = _SHARE.get()
    return rows if share is None else rows * share.whole


def idle() -> bool:
    """Return whether this process only computes rows that another process also computes."""
    share = _SHARE.get()
    return share is not None and share.spare
