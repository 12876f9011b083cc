"""Measurements of a model's pictures: sampled for prompts, scored by the judge."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rewards.judge import Judge
from steer.flow import FlowMap
from steer.tuning.statistics import kid

__all__ = ["draw", "found", "kid"]


@torch.no_grad()
def draw(flow: FlowMap, prompts: Sequence[str], steps: int, seed: int, batch: int = 50) -> Tensor:
    """Sample one picture per prompt by `steps` equal jumps -> images (p, 3, h, w), clamped."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(prompts), *flow.event_shape, generator=generator)
    images = []
    for start in range(0, len(prompts), batch):
        bound = flow.given(prompts[start : start + batch])
        x = noise[start : start + batch]
        for k in range(steps):
            x = bound.jump(x, k / steps, (k + 1) / steps)
        images.append(flow.decode(x).clamp(0, 1))
    return torch.cat(images)


def found(
    judge: Judge,
    images: Tensor,
    names: Sequence[str],
    among: Sequence[str],
    captions: int = 100,
    seed: int = 0,
) -> Tensor:
    """Return whether each picture's own name scores highest of `captions` names, bool (n,).

    Args:
        judge: the judge that scores.
        images: (n, 3, h, w).
        names: each picture's own name, one of `among`.
        among: names from which the others are sampled, the same for each picture.
        captions: number of names to choose from; all of `among` if there are fewer.
        seed: seed for sampling the others.
    """
    distinct = list(dict.fromkeys(among))
    generator = torch.Generator().manual_seed(seed)
    order = [distinct[i] for i in torch.randperm(len(distinct), generator=generator).tolist()]
    scores = judge.similarity(images, order)
    own = torch.tensor([order.index(name) for name in names], device=scores.device)
    # the first ones, with its own instead of the last if it is not among them
    place = torch.arange(len(order), device=scores.device)
    others = place < captions - (own >= captions).long()[:, None]
    allowed = others | (place == own[:, None])
    return scores.masked_fill(~allowed, -torch.inf).argmax(1) == own
