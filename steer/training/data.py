"""Lightning training of a flow map: running average, exact resume, Muon with AdamW.

Everything that is drawn in step k is a function of (seed, k), so a run that was stopped and
resumed equals one that never was. Import it by name: `import steer` does not load Lightning.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.data import DataLoader

__all__ = ["Batch", "Batches", "generator_of", "step_loader"]

Batch = tuple[Tensor, list[str]]


def generator_of(seed: int, step: int, stream: int = 0) -> torch.Generator:
    """Return the generator of one step: a function of (seed, step, stream) alone."""
    mixed = (seed * 1_000_003 + step) * 7 + stream
    return torch.Generator().manual_seed(mixed % (1 << 63))


class Batches:
    """Draw the batch of a step: shifted pictures in [-1, 1] and their captions.

    A picture is shifted by up to `shift` whole pixels, but only inside its own blank margin: no
    ink is ever cut. Every picture is seen once before any is seen twice.

    Args:
        images: pictures on white (n, 3, h, w) in [0, 1]; their ink says how far one may shift.
        draw: (index, generator) -> (the picture or a variant of it, a caption).
        batch_size: pictures a step.
        seed: with the step, it fixes the batch.
        empty: share of empty prompts.
        shift: largest shift in pixels.
    """

    def __init__(
        self,
        images: Tensor,
        draw: Callable[[int, torch.Generator], tuple[Tensor, str]],
        batch_size: int,
        *,
        seed: int = 0,
        empty: float = 0.12,
        shift: int = 2,
    ) -> None:
        self.images, self.draw, self.batch_size = images, draw, batch_size
        self.seed, self.empty, self.shift = seed, empty, shift
        ink = (images < 0.99).any(1)
        rows, columns = ink.any(2).int(), ink.any(1).int()
        margins = [rows.argmax(1), rows.flip(1).argmax(1)]
        margins += [columns.argmax(1), columns.flip(1).argmax(1)]
        self.margins = torch.stack(margins, 1).clamp(max=shift)

    def _shifted(self, i: int, picture: Tensor, generator: torch.Generator) -> Tensor:
        shifts = []
        for before, after in self.margins[i].reshape(2, 2).tolist():
            shifts.append(int(torch.randint(-before, after + 1, (), generator=generator)))
        return picture.roll(shifts, (1, 2))

    def __call__(self, step: int) -> Batch:
        """Return the pictures (batch, 3, h, w) and the prompts of a step."""
        n = len(self.images)
        places = range(step * self.batch_size, (step + 1) * self.batch_size)
        orders = {
            epoch: torch.randperm(n, generator=generator_of(self.seed, epoch, 1)).tolist()
            for epoch in {p // n for p in places}
        }
        generator = generator_of(self.seed, step, 2)
        pictures, prompts = [], []
        for p in places:
            i = orders[p // n][p % n]
            picture, caption = self.draw(i, generator)
            pictures.append(self._shifted(i, picture, generator))
            none = float(torch.rand((), generator=generator)) < self.empty
            prompts.append("" if none else caption)
        return 2 * torch.stack(pictures) - 1, prompts


def step_loader(steps: int) -> DataLoader:
    """Return a loader that only counts: the batch itself is a function of the global step."""
    return DataLoader(range(steps), batch_size=None)  # type: ignore[arg-type]
