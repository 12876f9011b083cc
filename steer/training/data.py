"""The random numbers of a training step, a function of (seed, step), also after a resume."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

__all__ = ["Batch", "Batches", "Prefetched", "generator_of", "step_loader"]

Batch = tuple[Tensor, list[str]]
"""x (batch, *event), and a caption for each row."""


def generator_of(seed: int, step: int, stream: int = 0) -> torch.Generator:
    """Return the generator of one step: a function of (seed, step, stream) only."""
    mixed = (seed * 1_000_003 + step) * 7 + stream
    return torch.Generator().manual_seed(mixed % (1 << 63))


class Batches:
    """Sample the batch of a step: every item is used once before any is used twice.

    Args:
        count: number of items.
        draw: (index, generator) -> (x of the item, or of a variant of it, and a caption).
        batch_size: items per step.
        seed: with the step, it fixes the batch.
        empty: fraction of empty captions.
    """

    def __init__(
        self,
        count: int,
        draw: Callable[[int, torch.Generator], tuple[Tensor, str]],
        batch_size: int,
        *,
        seed: int = 0,
        empty: float = 0.12,
    ) -> None:
        self.count, self.draw, self.batch_size = count, draw, batch_size
        self.seed, self.empty = seed, empty

    def __call__(self, step: int) -> Batch:
        """Return x (batch, *event) and the captions of a step."""
        n = self.count
        places = range(step * self.batch_size, (step + 1) * self.batch_size)
        orders = {
            epoch: torch.randperm(n, generator=generator_of(self.seed, epoch, 1)).tolist()
            for epoch in {p // n for p in places}
        }
        generator = generator_of(self.seed, step, 2)
        drawn, captions = [], []
        for p in places:
            x, caption = self.draw(orders[p // n][p % n], generator)
            drawn.append(x)
            none = float(torch.rand((), generator=generator)) < self.empty
            captions.append("" if none else caption)
        return torch.stack(drawn), captions


class _Steps(Dataset):
    """The batches from a first step on, indexed relative to it."""

    def __init__(self, batches: Callable[[int], Batch], first: int, steps: int) -> None:
        self.batches, self.first, self.steps = batches, first, steps

    def __len__(self) -> int:
        return self.steps - self.first

    def __getitem__(self, place: int) -> Batch:
        return self.batches(self.first + place)


class Prefetched:
    """The same batches, prepared in advance by worker processes of torch's loader, from any step.

    Args:
        batches: step -> its batch.
        steps: length of the run.
        workers: processes.
    """

    def __init__(self, batches: Callable[[int], Batch], steps: int, workers: int) -> None:
        self.batches, self.steps, self.workers = batches, steps, workers
        self._next: int | None = None

    def __call__(self, step: int) -> Batch:
        """Return the batch of a step; consecutive steps need not wait."""
        if step != self._next:
            rest = _Steps(self.batches, step, max(self.steps, step + 1))
            self._ahead = iter(DataLoader(rest, batch_size=None, num_workers=self.workers))
        self._next = step + 1
        return next(self._ahead)


def step_loader(steps: int) -> DataLoader:
    """Return a loader that only counts: the batch itself is a function of the global step."""
    return DataLoader(range(steps), batch_size=None)  # type: ignore[arg-type]
