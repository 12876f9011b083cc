"""Recoloured emoji, from which models learn pairs such as "a blue apple" that no set contains.

The hues near a picture's dominant hue are rotated to the requested colour; leaves, eyes and
outlines keep theirs. Drawings without a colour of their own (a grey elephant) are tinted.
"""

import zlib
from functools import cache

import torch
from torch import Tensor

from recipes.data.emoji import COLOURS, Emoji

__all__ = ["HUES", "Recoloured", "dominant_colour", "dominant_hue", "recolour"]

HUES = {
    "red": 0.0, "orange": 26.0, "yellow": 52.0, "green": 120.0, "blue": 214.0, "purple": 278.0,
    "pink": 325.0,
}  # fmt: skip
"""The target colours of recolouring, as hues in degrees."""

BINS = 72
NAMED = {*COLOURS, "brown", "black", "white", "grey"}


def _hsv(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return hue in degrees, chroma and value of x (n, 3, h, w) in [0, 1], (n, h, w) each."""
    high, low = x.amax(1), x.amin(1)
    chroma = high - low
    r, g, b = x.unbind(1)
    c = chroma.clamp(min=1e-6)
    hue = torch.where(
        high == r,
        (g - b) / c % 6,
        torch.where(high == g, (b - r) / c + 2, (r - g) / c + 4),
    )
    return hue * 60, chroma, high


def _rgb(hue: Tensor, chroma: Tensor, value: Tensor) -> Tensor:
    """Return the inverse of `_hsv`, (n, 3, h, w)."""
    k = (torch.tensor([5.0, 3.0, 1.0]).view(1, 3, 1, 1) + hue[:, None] / 60) % 6
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)


def _between(a: Tensor, b: Tensor | float) -> Tensor:
    """Return the signed angle a - b in (-180, 180]."""
    return (a - b + 180) % 360 - 180


def dominant_hue(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the dominant hue in degrees, and the colourfulness of the ink.

    The hue is the peak of the chroma-weighted histogram (5 degrees a bin, smoothed over 25); the
    second number is the mean chroma of the ink (pixels that are not white).

    Args:
        images: (n, 3, h, w) in [0, 1], on white.
    """
    hue, chroma, _ = _hsv(images.clamp(0, 1))
    n = len(images)
    weight = torch.where(chroma > 0.1, chroma, torch.zeros(())).flatten(1)
    bins = (hue.flatten(1) * BINS / 360).long() % BINS
    histogram = torch.zeros(n, BINS).scatter_add_(1, bins, weight)
    smooth = sum(histogram.roll(k, 1) * (3 - abs(k)) for k in range(-2, 3))
    ink = (images.amin(1) < 0.9).flatten(1).float()
    strength = (chroma.flatten(1) * ink).sum(1) / ink.sum(1).clamp(min=1)
    return (smooth.argmax(1) + 0.5) * 360 / BINS, strength  # type: ignore[union-attr]


def dominant_colour(images: Tensor) -> list[str]:
    """Return the name of `HUES` that is nearest to each picture's dominant hue."""
    hue, _ = dominant_hue(images)
    centres = torch.tensor(list(HUES.values()))
    nearest = _between(hue[:, None], centres[None]).abs().argmin(1)
    return [list(HUES)[i] for i in nearest.tolist()]


def recolour(images: Tensor, name: str) -> Tensor:
    """Recolour pictures (n, 3, h, w) in [0, 1], on white, to a colour of `HUES`; same shape."""
    target = HUES[name]
    hue, chroma, value = _hsv(images)
    peak, strength = dominant_hue(images)
    near = _between(hue, peak[:, None, None]).abs()
    body = ((75 - near) / 25).clamp(0, 1)  # 1 within 50 degrees of the peak, 0 beyond 75
    # white highlights and the background, black outlines and pupils carry no hue
    inside = ((0.97 - images.amin(1)) / 0.12).clamp(0, 1) * ((value - 0.15) / 0.2).clamp(0, 1)
    grey = strength[:, None, None] < 0.12
    mask = torch.where(grey, inside, body * ((chroma - 0.04) / 0.08).clamp(0, 1))
    # keep the shading (half of the spread of the hue), and raise the chroma so that the colour is
    # visible
    turned = target + torch.where(grey, torch.zeros(()), 0.35 * _between(hue, peak[:, None, None]))
    saturation = chroma / value.clamp(min=1e-3)
    saturation = torch.where(grey, torch.full((), 0.6), saturation.clamp(min=0.45))
    if name == "pink":
        saturation = saturation.clamp(max=0.6)
    bright = 1.0 - (1.0 - value) * {"yellow": 0.35, "orange": 0.55, "pink": 0.4}.get(name, 0.85)
    painted = _rgb(turned % 360, bright * saturation, bright)
    return torch.lerp(images, painted, mask[:, None])


class Recoloured:
    """The emoji in every colour of `HUES` that they do not have already.

    Args:
        emoji: the pictures.
        held_out: fraction of the (concept, colour) pairs that are left out.

    Attributes:
        images: colour -> uint8 (n, 3, h, w).
        usable: bool (n, colours): recolouring gave that colour by `dominant_colour`, the picture
            did not have it before, and the pair is not held out.
        held_out: bool (n, colours).
    """

    def __init__(self, emoji: Emoji, held_out: float = 0.1) -> None:
        self.emoji = emoji
        self.names = list(HUES)
        before = [{*emoji.colours[i]} for i in range(len(emoji))]
        usable = []
        self.images = {}
        for name in self.names:
            x = recolour(emoji.images, name)
            named = dominant_colour(x)
            usable.append([named[i] == name and name not in before[i] for i in range(len(emoji))])
            self.images[name] = (x * 255).round().to(torch.uint8)
        self.held_out = torch.tensor(
            [[is_held_out(label, name, held_out) for name in self.names] for label in emoji.labels]
        )
        self.usable = torch.tensor(usable).T & ~self.held_out

    def picture(self, i: int, name: str) -> Tensor:
        """Return picture i in a colour, float32 (3, h, w) in [0, 1]."""
        return self.images[name][i].float() / 255

    def draw(self, i: int, generator: torch.Generator) -> str | None:
        """Sample a usable colour for picture i, uniformly; None if there is none."""
        usable = self.usable[i].nonzero()[:, 0].tolist()
        if not usable:
            return None
        return self.names[usable[int(torch.randint(len(usable), (), generator=generator))]]

    def captions(self, i: int, name: str, generator: torch.Generator) -> str:
        """Sample a true caption of picture i in a colour, of random specificity."""
        emoji = self.emoji
        style, label = emoji.styles[i], plain_label(emoji.labels[i])
        forms = [
            (0.62, [name, label]),
            (0.10, [style, name, label]),
            (0.10, [name, emoji.groups[i]]),
            (0.10, [name, emoji.subgroups[i]]),
            (0.05, [name]),
        ]
        bounds = torch.tensor([weight for weight, _ in forms]).cumsum(0)
        u = torch.rand((), generator=generator)
        place = min(int((bounds <= u).sum()), len(forms) - 1)
        return " ".join(dict.fromkeys(forms[place][1]))


def plain_label(label: str) -> str:
    """Return a label without the colour that it names.

    >>> plain_label("red apple"), plain_label("fox")
    ('apple', 'fox')
    """
    return " ".join(w for w in label.split() if w not in NAMED) or label


def is_held_out(label: str, colour: str, share: float = 0.1) -> bool:
    """Return whether a (concept, colour) pair is left out of all training, by a hash."""
    return zlib.crc32(f"{colour} {label}".encode()) % 1000 < 1000 * share


@cache
def load() -> Recoloured:
    """Return the recoloured emoji of the package."""
    from recipes.data import emoji

    return Recoloured(emoji.load())


assert set(HUES) == set(COLOURS)
