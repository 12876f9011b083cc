"""Recoloured emoji: the colour is right, the drawing stays, and held-out pairs stay out."""

import pytest
import torch

from recipes.contrastive import Pairs, twisted
from recipes.data import emoji as plain
from recipes.data import recolour
from recipes.data.recolour import HUES, dominant_colour, dominant_hue, is_held_out, plain_label


def flat(rgb):
    x = torch.ones(1, 3, 16, 16)
    x[:, :, 4:12, 4:12] = torch.tensor(rgb).view(1, 3, 1, 1)
    return x


@pytest.mark.parametrize(
    ("rgb", "name"),
    [
        ((0.9, 0.1, 0.1), "red"), ((1.0, 0.5, 0.1), "orange"), ((0.95, 0.9, 0.2), "yellow"),
        ((0.1, 0.8, 0.2), "green"), ((0.1, 0.3, 0.9), "blue"), ((0.5, 0.2, 0.8), "purple"),
        ((1.0, 0.4, 0.7), "pink"),
    ],
)  # fmt: skip
def test_the_dominant_colour_is_named(rgb, name):
    assert dominant_colour(flat(rgb)) == [name]
    hue, strength = dominant_hue(flat(rgb))
    assert 0 <= float(hue) < 360
    assert float(strength) == pytest.approx(max(rgb) - min(rgb), abs=1e-5)


@pytest.mark.parametrize("name", HUES)
def test_a_recoloured_picture_has_the_colour_and_the_drawing(name):
    emoji = plain.load()
    images = emoji.images[::17]
    turned = recolour.recolour(images, name)
    assert turned.shape == images.shape
    assert 0 <= float(turned.min()) <= float(turned.max()) <= 1
    right = [c == name for c in dominant_colour(turned)]
    assert sum(right) / len(right) > 0.8
    white = (images.amin(1) > 0.98)[:, None].expand_as(images)
    assert torch.allclose(turned[white], images[white], atol=0.02)  # the ground is left alone


def test_what_is_usable():
    other, emoji = recolour.load(), plain.load()
    assert other.usable.shape == (len(emoji), len(HUES))
    assert 0.6 < float(other.usable.float().mean()) < 0.95
    assert not (other.usable & other.held_out).any()
    assert 0.05 < float(other.held_out.float().mean()) < 0.15
    red = other.names.index("red")
    assert not any(other.usable[i][red] for i, c in enumerate(emoji.colours) if "red" in c)
    assert is_held_out("fox", "blue", 1.0)
    assert not is_held_out("fox", "blue", 0.0)


def test_captions_name_the_colour_and_not_the_old_one():
    other, emoji = recolour.load(), plain.load()
    g = torch.Generator().manual_seed(0)
    i = emoji.labels.index("red apple")
    captions = {other.captions(i, "blue", g) for _ in range(60)}
    assert "blue apple" in captions
    assert all("blue" in c and "red" not in c.split() for c in captions)
    assert plain_label("red apple") == "apple"


def test_twisted_captions_are_false():
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        assert twisted("blue fox", g).split()[0] in set(HUES) - {"blue"}
        assert twisted("glossy 3d fox", g) != "glossy 3d fox"
        assert twisted("fox", g).split()[-1] == "fox"
        assert twisted("fox", g) != "fox"


def test_pairs_mix_recoloured_pictures_in():
    emoji = plain.load()
    pairs = Pairs(emoji, emoji.train, 40, 0, lambda x, g: x, recoloured=1.0)
    pictures, texts, truth, own, labels = pairs(0)
    assert pictures.shape == (40, 3, 32, 32)
    assert len(texts) == 80
    assert truth.shape == (40, 80)
    assert truth[:, :40].diagonal().all()
    assert labels[torch.arange(40), own].all()
    assert float(truth[:, 40:].diagonal().float().mean()) < 0.1
    named = [next((w for w in t.split() if w in HUES), None) for t in texts[:40]]
    seen = dominant_colour(pictures)
    agree = [a == b for a, b in zip(named, seen, strict=True) if a]
    assert len(agree) > 25
    assert sum(agree) / len(agree) > 0.9
