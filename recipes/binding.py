"""Binding of colour and style words of a prompt, also for pairs that were never trained on."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from recipes.data.emoji import Emoji
from recipes.data.recolour import HUES, dominant_colour, is_held_out, plain_label, recolour
from recipes.figures import rate
from recipes.measure import draw, found
from rewards.judge import Judge
from steer.flow import FlowMap

__all__ = ["colour_binding", "colour_pairs", "style_binding"]

Pair = tuple[str, str, int]


def colour_pairs(emoji: Emoji) -> dict[str, list[Pair]]:
    """Return the (colour, concept, picture) triples where no real picture has that colour.

    "trained": a recoloured picture in the training data has that colour; "held out": all such
    pictures are left out of training. Concepts are plain labels. The picture is one of the concept
    that recolouring turns to that colour; pairs without such a picture are left out.
    """
    of: dict[str, list[int]] = {}
    for i, label in enumerate(emoji.labels):
        of.setdefault(plain_label(label), []).append(i)
    seen = {c: {w for i in rows for w in emoji.colours[i]} for c, rows in of.items()}
    pairs: dict[str, list[Pair]] = {"trained": [], "held out": []}
    for colour in HUES:
        turned = dominant_colour(recolour(emoji.images, colour))
        for concept, rows in of.items():
            good = [i for i in rows if turned[i] == colour]
            left_out = [is_held_out(emoji.labels[i], colour) for i in rows]
            if colour in seen[concept] or not good:
                continue
            if all(left_out):
                pairs["held out"].append((colour, concept, good[0]))
            elif not any(left_out):
                trained = [i for i in good if not emoji.held_out[i]]
                pairs["trained"] += [(colour, concept, i) for i in trained[:1]]
    return pairs


def colour_binding(flow: FlowMap, emoji: Emoji, judge: Judge, prompts: int) -> dict[str, Any]:
    """Return how often "blue fox" gives a blue picture, a fox according to the judge, and both.

    "real": the recoloured real pictures of the same pairs. They are selected by their colour, so
    they give the upper bound of the judge.

    Args:
        flow: the model, 4 steps.
        emoji: the data.
        judge: the judge, which chooses one concept of 100.
        prompts: number of prompts, half of them trained pairs.
    """
    labels = [plain_label(label) for label in emoji.concepts]
    generator = torch.Generator().manual_seed(8)
    made: dict[str, Any] = {}
    for kind, pairs in colour_pairs(emoji).items():
        order = torch.randperm(len(pairs), generator=generator)[: (prompts + 1) // 2].tolist()
        chosen = [pairs[i] for i in order]
        captions = [f"{colour} {concept}" for colour, concept, _ in chosen]
        real = torch.cat([recolour(emoji.images[i : i + 1], colour) for colour, _, i in chosen])
        for whose, images in (("model", draw(flow, captions, 4, 9)), ("real", real)):
            made[f"{kind}, {whose}"] = _colours(judge, images, chosen, labels)
    return made


def _colours(
    judge: Judge, images: Tensor, pairs: Sequence[Pair], labels: Sequence[str]
) -> dict[str, Any]:
    named = dominant_colour(images)
    colour = torch.tensor([name == pair[0] for name, pair in zip(named, pairs, strict=True)])
    concept = found(judge, images, [pair[1] for pair in pairs], labels)
    hits = {"colour": colour, "concept": concept, "both": colour & concept}
    return {name: rate(hit)._asdict() for name, hit in hits.items()} | {"pictures": len(pairs)}


def style_binding(flow: FlowMap, emoji: Emoji, judge: Judge, prompts: int) -> dict[str, Any]:
    """Return how often the judge recognises label and style of "flat twemoji fox".

    The label of 100 labels, the style of the label's four style captions, and both; for pairs of
    concept and style that models are trained on, and for the held-out ones. "real": the real
    pictures of the same pairs, all of which the judge was trained on.

    Args:
        flow: the model, 4 steps.
        emoji: the data.
        judge: the judge.
        prompts: number of prompts, half of them trained pairs.
    """
    generator = torch.Generator().manual_seed(10)
    made: dict[str, Any] = {}
    for kind, index in (("trained", emoji.train), ("held out", emoji.held)):
        rows = index[torch.randperm(len(index), generator=generator)[: (prompts + 1) // 2]]
        chosen = rows.tolist()
        captions = [f"{emoji.styles[i]} {emoji.labels[i]}" for i in chosen]
        for whose, images in (
            ("model", draw(flow, captions, 4, 11)),
            ("real", emoji.images[rows]),
        ):
            label = found(judge, images, [emoji.labels[i] for i in chosen], emoji.concepts)
            style = torch.tensor(
                [_style(judge, image, emoji, i) for image, i in zip(images, chosen, strict=True)]
            )
            hits = {"label": label, "style": style, "both": label & style}
            made[f"{kind}, {whose}"] = {k: rate(hit)._asdict() for k, hit in hits.items()} | {
                "pictures": len(chosen)
            }
    return made


def _style(judge: Judge, image: Tensor, emoji: Emoji, i: int) -> bool:
    """Return whether picture i's style caption scores highest among those of its label."""
    styles = list(dict.fromkeys(emoji.styles))
    scores = judge.similarity(image[None], [f"{style} {emoji.labels[i]}" for style in styles])
    return styles[int(scores.argmax())] == emoji.styles[i]
