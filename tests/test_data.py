import torch

from recipes.data.emoji import COLOURS, FILE, load
from steer.models.words import split


def test_the_data_is_what_its_documentation_says():
    emoji = load()
    assert 300 <= len(emoji.concepts) <= 500
    assert len(emoji) == 4 * len(emoji.concepts)
    assert emoji.images.shape == (len(emoji), 3, 32, 32)
    assert 0 <= emoji.images.min() < emoji.images.max() <= 1
    assert set(emoji.groups) == {"animal", "plant", "food", "drink", "face"}
    assert len(set(emoji.styles)) == 4
    assert FILE.stat().st_size < 2_000_000


def test_a_tenth_of_the_pairs_is_held_out_and_the_rest_is_for_training():
    emoji = load()
    assert abs(len(emoji.held) / len(emoji) - 0.1) < 0.005
    both = torch.cat([emoji.train, emoji.held]).sort().values
    assert torch.equal(both, torch.arange(len(emoji)))
    # no concept and no style is held out altogether
    assert {emoji.labels[i] for i in emoji.train.tolist()} == set(emoji.labels)


def test_no_two_pictures_of_a_style_are_the_same():
    images = load().images.flatten(1)
    for style in range(4):
        same = torch.cdist(images[style::4], images[style::4]).fill_diagonal_(torch.inf)
        assert same.min() > 1


def test_captions_are_true_of_their_picture_at_every_level_and_follow_their_generator():
    emoji = load()
    i = emoji.labels.index("fox")
    true = {w for t in (*emoji.tags[i], *emoji.colours[i]) for w in split(t)}
    true |= set(split(f"{emoji.labels[i]} {emoji.styles[i]} {emoji.groups[i]}"))
    true |= set(split(emoji.subgroups[i]))
    drawn = [emoji.captions(i, torch.Generator().manual_seed(k)) for k in range(400)]
    assert drawn == [emoji.captions(i, torch.Generator().manual_seed(k)) for k in range(400)]
    assert all(caption and set(split(caption)) <= true for caption in drawn)
    assert {"fox", "animal", "mammal", "cartoon fox", "orange fox"} <= set(drawn)


def test_colour_words_are_right():
    emoji = load()
    for label, colour in [("red apple", "red"), ("green apple", "green"), ("polar bear", "white")]:
        found = [emoji.colours[i] for i, name in enumerate(emoji.labels) if name == label]
        assert sum(colour in words for words in found) >= 2
    assert {c for words in emoji.colours for c in words} <= {
        *COLOURS, "brown", "grey", "black", "white",
    }  # fmt: skip
