"""A reward on its own device: `placed(pickscore, device=cuda:1)`."""

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from rewards.combine.algebra import Composed
from steer.reward import Reward

__all__ = ["Placed"]


class Placed(Composed):
    """A reward that stays on its own device, for models that fill another one.

    Pictures are copied there, scores and gradients back. `to(device)` does not move it.

    Args:
        reward: what is placed.
        device: the device, for instance "cuda:1" or "cpu".

    Raises:
        ValueError: a device that this machine does not have.
    """

    def __init__(self, reward: Reward | Callable[..., Tensor], device: str) -> None:
        super().__init__(reward)
        try:
            self.device = torch.empty(0, device=device).device
        except (RuntimeError, AssertionError) as error:
            raise ValueError(
                f"device {device!r} for a reward: {str(error).splitlines()[0]}"
            ) from None
        for part in self.children():
            part.to(self.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        return self

    def join(self, scores: Tensor) -> Tensor:
        """Return the score, (1, n) -> (n,)."""
        return scores[0]

    def forward(
        self,
        images: Tensor,
        prompts: Sequence[str] | None = None,
        metadata: Sequence[Any] | None = None,
    ) -> Tensor:
        """Score pictures (n, 3, h, w) -> (n,); both are on the device of the run."""
        return super().forward(images.to(self.device), prompts, metadata).to(images.device)
