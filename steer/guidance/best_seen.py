"""Keep the best lookahead: each particle returns the best clean sample of its run."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from steer.batches import Batched
from steer.flow import FlowMap
from steer.guidance.population import Population
from steer.path import like
from steer.reward import Rest, plain

__all__ = ["BestSeen"]


class BestSeen:
    """A sampler whose particles return the clean sample with their highest reward.

    It needs no further network calls, since the lookaheads exist already. The law of an exact
    method is lost.

    Args:
        sampler: the sampler to run; its populations have the lookaheads, `population.clean`.
        flow: the flow that decodes the returned samples.
    """

    def __init__(self, sampler: Any, flow: FlowMap) -> None:
        self.sampler, self.flow = sampler, flow

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["sampler"], name)

    @property
    def batch_size(self) -> int | None:
        """The sampler's."""
        return self.sampler.batch_size

    @batch_size.setter
    def batch_size(self, size: int | None) -> None:
        self.sampler.batch_size = size

    @property
    def drop(self) -> bool:
        """The sampler's."""
        return self.sampler.drop

    @drop.setter
    def drop(self, drop: bool) -> None:
        self.sampler.drop = drop

    def steps(self, x0: Tensor, seed: int = 0, *, position: int = 0) -> Iterator[Population]:
        """Yield the sampler's populations, the last one with the best samples of the run."""
        best: Tensor | None = None
        height: Tensor | None = None
        for population in self.sampler.steps(x0, seed, position=position):
            reward = population.reward
            reward = torch.where(reward.isnan(), -torch.inf, reward)
            if population.time == 1 and best is not None and height is not None:
                better = (height > reward).flatten()
                x = population.x.flatten(0, reward.ndim - 1)
                old = best.flatten(0, reward.ndim - 1)
                x = torch.where(like(better.to(x), x) > 0, old, x)
                images = population.images
                if images is not None:
                    prompts = len(reward) if reward.ndim == 2 else 1
                    batched = Batched(self.flow, self.batch_size, prompts)
                    with plain(Rest(self.flow)), torch.no_grad():
                        images = batched.decode(x).reshape(images.shape)
                yield replace(
                    population,
                    x=x.reshape(population.x.shape),
                    reward=torch.maximum(height, reward),
                    images=images,
                )
                return
            yield population
            clean = population.clean
            if clean is not None:
                if best is None or height is None:
                    best, height = clean, reward
                else:
                    better = reward > height
                    wide = better.reshape(*better.shape, *[1] * (clean.ndim - better.ndim))
                    best, height = torch.where(wide, clean, best), torch.maximum(reward, height)
            kept = population.wish.keep
            if kept is not None and best is not None and height is not None:
                best, height = _kept(best, kept, height.ndim), _kept(height, kept, height.ndim)


def _kept(values: Tensor, index: Tensor, axes: int) -> Tensor:
    """Return the best samples of the kept particles, in the rows that now hold them."""
    flat = values if axes == 2 else values[None]
    chosen = index.expand(len(flat), -1) if index.ndim == 1 else index
    turns = chosen[:, torch.arange(flat.shape[1]) % chosen.shape[1]].to(values.device)
    rows = torch.stack([row[turn] for row, turn in zip(flat, turns, strict=True)])
    return rows if axes == 2 else rows[0]
