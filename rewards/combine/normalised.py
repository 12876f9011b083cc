"""A reward standardised by the run's scores: `normalised(clip) + normalised(colour:name=red)`."""

from collections.abc import Callable

import torch
from torch import Tensor

from rewards.combine.algebra import Composed
from steer.reward import Reward

__all__ = ["Normalised"]


class Normalised(Composed):
    """`(r - mean) / std`, with mean and standard deviation of the run's scores.

    Rewards with different units then have the same influence in a sum. In training mode the module
    records each score; `update()` adds the recorded scores to the statistics, so that the scale is
    constant within an optimizer step for any micro-batches, and constant in evaluation mode.
    `steer.finetune` updates the statistics during the run; `steer.sample` estimates them once,
    from one-jump samples of its prompts. Until the first `update()` it is the bare reward.

    The statistics (updates, mean, mean square) are kept in float64 on the CPU; a tuning run saves
    them in its checkpoints and restores them on resume.

    Args:
        reward: what is normalised.
        decay: weight of the old statistics at an `update()`; early updates are averaged evenly.
        centre: whether to subtract the mean; a constant does not change the law that is sampled.

    Raises:
        ValueError: a decay out of [0, 1).
    """

    def __init__(
        self,
        reward: Reward | Callable[..., Tensor],
        decay: float = 0.99,
        centre: bool = True,
    ) -> None:
        super().__init__(reward)
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay}")
        self.decay, self.centre = float(decay), centre
        self.statistics = torch.zeros(3, dtype=torch.float64)
        self.noted = torch.zeros(3, dtype=torch.float64)

    @property
    def learned(self) -> bool:
        """Whether there are statistics yet."""
        return bool(self.statistics[0] > 0)

    @property
    def mean(self) -> Tensor:
        """The mean, (); 0 before there are statistics."""
        return self.statistics[1]

    @property
    def std(self) -> Tensor:
        """The standard deviation, (); 1 before there are statistics."""
        if not self.learned:
            return torch.ones_like(self.mean)
        return (self.statistics[2] - self.mean.square()).clamp(min=0).sqrt()

    def join(self, scores: Tensor) -> Tensor:
        """Return the normalised scores, (1, n) -> (n,), and record them in training mode."""
        row = scores[0]
        if self.training:
            seen = row.detach().cpu().double()
            self.noted += torch.stack(
                [seen.new_tensor(len(seen)), seen.sum(), seen.square().sum()]
            )
        if not self.learned:
            return row
        mean = float(self.mean) if self.centre else 0.0
        return (row - mean) / max(float(self.std), 1e-6)

    def forget(self) -> None:
        """Discard recorded scores that have not been added to the statistics."""
        self.noted = torch.zeros(3, dtype=torch.float64)

    @torch.no_grad()
    def update(self, reduce: Callable[[Tensor], Tensor] | None = None) -> None:
        """Add the recorded scores to the statistics, and discard them.

        Args:
            reduce: sums (3,) over processes, where there are several.
        """
        noted = self.noted if reduce is None else reduce(self.noted).cpu()
        self.noted = torch.zeros(3, dtype=torch.float64)
        count = noted[0]
        if not count > 0:
            return
        updates = self.statistics[0]
        old = torch.clamp(updates / (updates + 1), max=self.decay)
        new = torch.stack([torch.ones_like(count), noted[1] / count, noted[2] / count])
        self.statistics = old * self.statistics + (1 - old) * new
        self.statistics[0] = updates + 1

    def get_extra_state(self) -> Tensor:
        """Return the statistics, for `state_dict`."""
        return self.statistics.clone()

    def set_extra_state(self, state: Tensor) -> None:
        """Restore the statistics from a `state_dict`."""
        self.statistics = state.clone()
