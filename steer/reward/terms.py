"""Decompose a composed reward: scores and gradients of its elementary rewards."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from steer.devices import differentiating
from steer.reward.base import Reward, name_of, score
from steer.reward.sharing import sharing

__all__ = ["dissect", "learners", "leaves", "term_gradients", "term_scores"]


def leaves(reward: Reward) -> list[Reward]:
    """Return the elementary rewards of a composed reward, from left to right."""
    if [r for _, r in reward.terms] == [reward]:
        return [reward]
    return [leaf for _, term in reward.terms for leaf in leaves(term)]


def term_scores(
    reward: Reward, images: Tensor, prompts: Sequence[str] | None = None
) -> dict[str, Tensor]:
    """Score each elementary term of a composed reward separately, unweighted: name -> (n,).

    >>> from steer.reward import wrap
    >>> light, dark = wrap(lambda x: x.mean((1, 2, 3))), wrap(lambda x: -x.mean((1, 2, 3)))
    >>> {k: v.item() for k, v in term_scores(light + dark, torch.ones(1, 3, 2, 2)).items()}
    {'<lambda>': 1.0, '<lambda> 2': -1.0}
    """
    with sharing():
        return {
            name: score(term, images, prompts) for name, term in _titled(leaves(reward)).items()
        }


def _titled(rewards: Sequence[Reward]) -> dict[str, Reward]:
    """Give each reward a unique name: the second one of a name is 'name 2'."""
    out: dict[str, Reward] = {}
    for reward in rewards:
        name = title = name_of(reward)
        count = 2
        while title in out:
            title, count = f"{name} {count}", count + 1
        out[title] = reward
    return out


def term_gradients(
    reward: Reward, images: Tensor, prompts: Sequence[str] | None = None
) -> dict[str, Tensor]:
    """Return the contribution of each leaf to the gradient: name -> norm per row, (n,).

    `|d total / d s_i * d s_i / d images|` with s_i the leaf's score: for a weighted sum,
    `w_i |d s_i / d images|`. Leaves without a gradient are left out.

    >>> from steer.reward import wrap
    >>> light = wrap(lambda x: x.mean((1, 2, 3)))
    >>> term_gradients(2.0 * light, torch.ones(1, 3, 2, 2))["<lambda>"] * 12**0.5
    tensor([2.0000])
    """
    out = {}
    for name, leaf in _titled(leaves(reward)).items():
        if not leaf.differentiable:
            continue
        x = images.detach().requires_grad_()
        with differentiating():
            total = _only(reward, leaf, x, prompts)
            (gradient,) = torch.autograd.grad(total.sum(), x, allow_unused=True)
        out[name] = (
            torch.zeros_like(total) if gradient is None else gradient.flatten(1).norm(dim=1)
        )
    return out


def dissect(
    reward: Reward,
    images: Tensor,
    prompts: Sequence[str] | None = None,
    batch_size: int = 64,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return `term_scores` and `term_gradients` of a composed reward; empty for other rewards.

    Args:
        reward: the reward.
        images: (n, 3, h, w).
        prompts: one per row, or None.
        batch_size: maximum number of rows per call.
    """
    if len(leaves(reward)) < 2:
        return {}, {}
    scores, gradients = [], []
    for a in range(0, len(images), batch_size):
        rows = slice(a, a + batch_size)
        asked = None if prompts is None else prompts[rows]
        with torch.no_grad():
            scores.append(term_scores(reward, images[rows], asked))
        gradients.append(
            term_gradients(reward, images[rows], asked) if reward.differentiable else {}
        )
    scored, shares = (
        {k: torch.cat([part[k] for part in parts]) for k in parts[0]}
        for parts in (scores, gradients)
    )
    return scored, shares


def _only(reward: Reward, leaf: Reward, images: Tensor, prompts: Sequence[str] | None) -> Tensor:
    """Score by the whole reward, with the gradient through one leaf only."""
    others = [r for r in leaves(reward) if r is not leaf]
    hooks = [r.register_forward_hook(lambda module, args, scores: scores.detach()) for r in others]
    try:
        total = score(reward, images, prompts)
    finally:
        for hook in hooks:
            hook.remove()
    return total if total.requires_grad else total + 0 * images.flatten(1).sum(1)


def learners(reward: Reward) -> list[Any]:
    """Return the parts that learn a scale from the scores of a run.

    They have `learned`, `update(reduce)` and `statistics`, as
    `rewards.combine.normalised.Normalised` does, and record scores in training mode.
    """
    return [m for m in reward.modules() if hasattr(m, "learned") and hasattr(m, "statistics")]
