"""A sampling run in groups of prompts: finished groups are stored, and joined at the end."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

import steer
from recipes.methods import Result, joined_trace
from recipes.partial import Partial
from steer.flow import flat_prompts
from steer.reward import dissect

__all__ = ["drawn_before", "join", "keep", "terms_of"]

SHARES = ("terms", "gradients")


def drawn_before(partial: Partial, group: int) -> bool:
    """Return whether the group that starts with this prompt is finished."""
    return partial.has(_name(group))


def keep(
    partial: Partial, group: int, results: Mapping[str, Result], terms: Mapping[str, Tensor]
) -> None:
    """Store a finished group: its results by title, and the reward's terms."""
    tensors: dict[str, Tensor] = dict(terms)
    notes: dict[str, Any] = {}
    for kind, result in results.items():
        for f in fields(result):
            value = getattr(result, f.name)
            if isinstance(value, Tensor):
                tensors[f"{kind}/{f.name}"] = value
            elif f.name == "trace":
                tensors |= {f"{kind}/trace/{k}": v for k, v in value.items()}
            else:
                notes[f"{kind}/{f.name}"] = value
    partial.add(_name(group), tensors, notes)


def join(
    partial: Partial,
    groups: Sequence[int],
    titles: Sequence[str],
    prompts: list[str] | None,
    asked: str | list[str] | None,
) -> tuple[dict[str, Result], dict[str, dict[str, Tensor]]]:
    """Join all groups.

    Args:
        partial: the unfinished run with the groups.
        groups: indices of their first prompts.
        titles: titles of the results of each group.
        prompts: all prompts.
        asked: the reward's prompts.

    Returns:
        The results by their titles, and "terms" and "gradients" by the terms' names.
    """
    units = [partial.read(_name(group)) for group in groups]
    parts, notes = [tensors for tensors, _ in units], [n for _, n in units]

    def joined(name: str) -> Tensor:
        if prompts is None:
            return parts[0][name]
        whole: Callable[[list[Tensor]], Tensor] = (
            joined_trace if "/trace/" in name else torch.cat  # type: ignore[assignment]
        )
        return whole([part[name] for part in parts])

    tensors = {name: joined(name) for name in parts[0]}
    made = {
        kind: Result(
            **{
                **_under(notes[0], kind),
                **_costs(notes, [part[f"{kind}/rewards"].numel() for part in parts], kind),
                **{k: v for k, v in _under(tensors, kind).items() if "/" not in k},
                "trace": _under(tensors, f"{kind}/trace"),
                "prompts": prompts,
                "reward_prompts": asked,
            }
        )
        for kind in titles
    }
    return made, {share: _under(tensors, share) for share in SHARES}


def _under(named: Mapping[str, Any], head: str) -> dict[str, Any]:
    """Return the entries with a prefix, with the prefix removed."""
    return {k.removeprefix(f"{head}/"): v for k, v in named.items() if k.startswith(f"{head}/")}


def _costs(notes: Sequence[Mapping[str, Any]], sizes: list[int], kind: str) -> dict[str, Any]:
    """Return the mean costs of a particle over groups of these sizes; seconds add up."""
    costs = [{"nfe": n[f"{kind}/nfe"], **n[f"{kind}/costs"]} for n in notes]
    mean = {
        k: sum(size * c[k] for size, c in zip(sizes, costs, strict=True)) / sum(sizes)
        for k in costs[0]
    }
    nfe = mean.pop("nfe")
    return {"nfe": nfe, "costs": mean | {"seconds": sum(c["seconds"] for c in costs)}}


def terms_of(
    reward: steer.Reward, result: Result, prompts: list[str] | None, asked: str | list[str] | None
) -> dict[str, Tensor]:
    """Score each term of a composed reward separately, and compute its share of the gradient.

    `terms/NAME` is in the term's own units, `gradients/NAME` is a norm per picture.
    """
    if result.images is None:
        return {}
    questions = prompts if asked is None else asked
    questions = [questions] if isinstance(questions, str) else questions
    images = result.images.flatten(0, -4)
    rows = None if questions is None else flat_prompts(questions, len(images))
    scores, gradients = dissect(reward, images, rows)
    found = {f"terms/{k}": v for k, v in scores.items()}
    found |= {f"gradients/{k}": v for k, v in gradients.items()}
    return {name: s.reshape(result.rewards.shape) for name, s in found.items()}


def _name(group: int) -> str:
    return f"{group:06d}"
