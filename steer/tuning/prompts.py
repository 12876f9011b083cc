"""The prompts of a tuning step, a function of (seed, step)."""

from collections.abc import Sequence

import torch

from steer.noise import generator

__all__ = ["Prompts"]


class Prompts:
    """The prompts of each step: every prompt is used once before any is used twice.

    Args:
        prompts: all prompts; None for a flow without prompts.
        asked: the reward's prompt for each, if it differs.
        seed: fixes the order.

    Raises:
        TypeError: one text instead of a list.
        ValueError: an empty list, or a number of reward prompts that differs from that of prompts.
    """

    def __init__(
        self, prompts: Sequence[str] | None, asked: Sequence[str] | None = None, seed: int = 0
    ) -> None:
        if isinstance(prompts, str):
            raise TypeError(f"prompts are a list: write prompts=[{prompts!r}]")
        if prompts is not None and not len(prompts):
            raise ValueError("the list of prompts is empty: give at least one, or None for none")
        if asked is not None and len(asked) != len(prompts or ()):
            raise ValueError(
                f"{len(asked)} reward prompts for {len(prompts or ())} prompts: give one for each"
            )
        self.prompts = None if prompts is None else list(prompts)
        self.asked = None if asked is None else list(asked)
        self.seed = seed

    def epochs(self, first: int, last: int) -> list[int]:
        """Return how often each of the prompts at these places was used before."""
        return [k // len(self.prompts or [""]) for k in range(first, last)]

    def __call__(self, first: int, last: int) -> tuple[list[str] | None, list[str] | None]:
        """Return the prompts at places first to last of the infinite list, and the reward's."""
        if self.prompts is None:
            return None, None
        n = len(self.prompts)
        orders = {
            epoch: torch.randperm(n, generator=generator(self.seed, epoch, "order")).tolist()
            for epoch in range(first // n, (last - 1) // n + 1)
        }
        chosen = [orders[k // n][k % n] for k in range(first, last)]
        asked = None if self.asked is None else [self.asked[i] for i in chosen]
        return [self.prompts[i] for i in chosen], asked
