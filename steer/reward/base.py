"""The interface of rewards, sums of rewards, and calling a reward."""

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from steer.ranges import finite
from steer.reward.door import check_images, check_scores
from steer.reward.sharing import sharing

__all__ = ["Reward", "WeightedSum", "clamp01", "name_of", "score"]


class Reward(nn.Module):
    """A reward: images (n, 3, h, w) as `FlowMap.decode` gives them -> scores (n,).

    Higher is better; the units are free; the scores are never reduced over the batch. Rewards can
    be added and scaled: `0.7 * a + 0.3 * b` is a reward.

    Attributes:
        differentiable: whether the scores carry a gradient to the images.
        pictures: whether four axes are pictures (n, 3, h, w); False for a reward of latents.
        takes: what its scores may depend on.
        made_of: files other than its code that it depends on, for instance pictures: if they
            change, a tuning run counts as a different one.
        terms: the terms of a weighted sum, with weights; the reward itself if it is not composed.
    """

    differentiable: bool = True
    pictures: bool = True
    takes: tuple[str, ...] = ("images", "prompts", "metadata")
    made_of: tuple[Path, ...] = ()

    def __call__(
        self,
        images: Tensor,
        prompts: Sequence[str] | None = None,
        metadata: Sequence[Any] | None = None,
    ) -> Tensor:
        """Score images; see `forward`.

        Raises:
            ValueError: images that are no floats, or no pictures (n, 3, h, w).
        """
        check_images(images, self.pictures)
        return super().__call__(images, prompts, metadata)

    @property
    def terms(self) -> "list[tuple[float, Reward]]":
        """The terms of the reward, (weight, reward); a single pair if it is not composed."""
        return [(1.0, self)]

    @abstractmethod
    def forward(
        self,
        images: Tensor,
        prompts: Sequence[str] | None = None,
        metadata: Sequence[Any] | None = None,
    ) -> Tensor:
        """Score images (n, 3, h, w), with one prompt per row if there are prompts -> (n,)."""

    def __add__(self, other: "Reward") -> "WeightedSum":
        return WeightedSum([*_summands(self), *_summands(other)])

    def __mul__(self, weight: float) -> "WeightedSum":
        return WeightedSum([(weight * w, reward) for w, reward in _summands(self)])

    __rmul__ = __mul__


class WeightedSum(Reward):
    """`sum_i w_i reward_i`, differentiable if every term is."""

    def __init__(self, terms: Sequence[tuple[float, Reward]]) -> None:
        super().__init__()
        self.weights = [finite("the weight of a reward", float(w)) for w, _ in terms]
        self.rewards = nn.ModuleList(reward for _, reward in terms)
        self.differentiable = all(reward.differentiable for _, reward in terms)
        self.pictures = any(reward.pictures for _, reward in terms)

    @property
    def terms(self) -> list[tuple[float, Reward]]:
        """The summands with their weights."""
        return list(zip(self.weights, self.rewards, strict=True))  # type: ignore[arg-type]

    def forward(
        self,
        images: Tensor,
        prompts: Sequence[str] | None = None,
        metadata: Sequence[Any] | None = None,
    ) -> Tensor:
        """Return the weighted sum of the terms' scores, (n,)."""
        with sharing():
            scores = [w * score(r, images, prompts, metadata) for w, r in self.terms]
        return torch.stack(scores).sum(0)


def _summands(reward: Reward) -> list[tuple[float, Reward]]:
    return reward.terms if isinstance(reward, WeightedSum) else [(1.0, reward)]


def name_of(reward: Reward) -> str:
    """Return the name of a reward for messages."""
    source = reward if "__name__" in vars(reward) else getattr(reward, "f", reward)
    return getattr(source, "__name__", type(source).__name__)


def score(
    reward: Reward,
    images: Tensor,
    prompts: Sequence[str] | None = None,
    metadata: Sequence[Any] | None = None,
) -> Tensor:
    """Call a reward and check that it returns (n,) scores and does not change the images.

    Raises:
        ValueError: the reward returned something else, or changed the images; the message says
            what.
    """
    name, watched = name_of(reward), not images.is_inference()
    before = images._version if watched else 0
    scores = check_scores(reward(images, prompts, metadata), images, name)
    if watched and images._version != before:
        raise ValueError(
            f"reward {name!r} changes its input images in place: work on a copy, images = "
            "images.clone()"
        )
    return scores


def clamp01(images: Tensor) -> Tensor:
    """Clamp to [0, 1] with the gradient passed straight through.

    The true gradient is zero outside [0, 1], so pixels outside could never return.
    """
    return images + (images.clamp(0, 1) - images).detach()
