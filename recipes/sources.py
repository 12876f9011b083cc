"""Training data of a network: the pictures of a data set, their captions and words."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Name", "Source", "source_of"]

Name = Literal["emoji", "fashion"]
"""Names of the data sets of the package."""

EMOJI = """blue apple|purple fox|green cat|red frog|blue pizza|red apple|green apple|fox|cat|
panda|tiger|elephant|penguin|frog|octopus|butterfly|strawberry|watermelon|banana|carrot|hamburger|
pizza|cupcake|teapot|sunflower|rose|cactus|grinning face|robot|flat fox|glossy 3d fox|animal|
mammal|bird|food|fruit|drink|face|plant|blue animal|"""


@dataclass(frozen=True)
class Source:
    """A data set to train on.

    Attributes:
        count: number of pictures.
        draw: (index, generator) -> (x of the picture, or of a variant of it, in [-1, 1], and a
            caption).
        words: words of all captions.
        sheet: prompts of sample sheets.
        size: side of a picture in pixels.
        colours: channels of a picture.
    """

    count: int
    draw: Callable[[int, torch.Generator], tuple[Tensor, str]]
    words: list[str]
    sheet: list[str]
    size: int = 32
    colours: int = 3


def source_of(
    name: str, recoloured: float = 0.3, shift: int = 2, folder: Path | None = None
) -> Source:
    """Return a data set of the package.

    Args:
        name: "emoji" or "fashion".
        recoloured: fraction of emoji that are recoloured, with the new colour in their caption.
        shift: largest random shift of an emoji, in pixels.
        folder: folder with the published files of fashion; None: the pictures of the package.
    """
    return _fashion(folder) if name == "fashion" else _emoji(recoloured, shift)


def _fashion(folder: Path | None) -> Source:
    from recipes.data.fashion import CLASSES, load
    from steer.models.words import split

    fashion = load(folder)
    captions = fashion.captions(fashion.train)

    def draw(i: int, generator: torch.Generator) -> tuple[Tensor, str]:
        return 2 * fashion.images[i] - 1, captions[i]

    words = sorted({w for name in CLASSES for w in split(name)})
    return Source(len(captions), draw, words, [*CLASSES * 4, "", ""], size=28, colours=1)


def _emoji(recoloured: float, shift: int) -> Source:
    from recipes.data import emoji as plain
    from recipes.data import recolour
    from recipes.data.shifts import shifted

    emoji, other = plain.load(), recolour.load()
    index = emoji.train.tolist()

    def draw(i: int, generator: torch.Generator) -> tuple[Tensor, str]:
        i = index[i]
        if float(torch.rand((), generator=generator)) < recoloured:
            name = other.draw(i, generator)
            if name is not None:
                return other.picture(i, name), other.captions(i, name, generator)
        return emoji.images[i], emoji.captions(i, generator)

    moved = shifted(emoji.images[index], draw, shift)

    def drawn(i: int, generator: torch.Generator) -> tuple[Tensor, str]:
        picture, caption = moved(i, generator)
        return 2 * picture - 1, caption  # the value that decodes to it

    return Source(len(index), drawn, _emoji_words(), EMOJI.replace("\n", "").split("|"))


def _emoji_words() -> list[str]:
    """Return the words of all captions."""
    from recipes.data.emoji import COLOURS, load
    from steer.models.words import split

    emoji = load()
    texts = [*emoji.labels, *emoji.styles, *emoji.groups, *emoji.subgroups, *COLOURS]
    texts += [t for tags in emoji.tags for t in tags] + ["brown", "grey", "black", "white"]
    return sorted({w for text in texts for w in split(text)})
