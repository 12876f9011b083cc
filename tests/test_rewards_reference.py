"""Similarity is minus the RMS distance to the picture in a file."""

import numpy as np
import pytest
import torch
from PIL import Image

import rewards
from rewards.pixels.reference import Similarity
from rewards.testing import RewardContract


@pytest.fixture
def file(tmp_path):
    g = torch.Generator().manual_seed(6)
    pixels = torch.randint(256, (8, 12, 3), generator=g, dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


class TestSimilarity(RewardContract):
    @pytest.fixture(autouse=True)
    def _file(self, file):
        self.file = file

    def create_reward(self):
        return Similarity(self.file)


class TestSimilarityOfLuma(TestSimilarity):
    def create_reward(self):
        return Similarity(self.file, by="luma")


def as_tensor(file):
    return torch.tensor(np.asarray(Image.open(file))).permute(2, 0, 1)[None] / 255


@pytest.mark.parametrize("by", ["colour", "luma"])
def test_similarity_is_the_formula(file, by):
    images = torch.rand(2, 3, 8, 12, generator=torch.Generator().manual_seed(7))
    reference = np.asarray(Image.open(file)) / 255
    for image, found in zip(images, Similarity(file, by)(images), strict=True):
        difference = image.double().permute(1, 2, 0).numpy() - reference
        if by == "luma":
            difference = difference @ [0.2126, 0.7152, 0.0722]
        assert float(found) == pytest.approx(-np.sqrt((difference**2).mean()), abs=2e-4)


def test_the_reference_is_resized_as_pillow_would(file):
    """The same filter, but for Pillow's rounding to bytes."""
    for size in [(4, 6), (5, 5), (20, 30)]:
        resized = Image.open(file).resize(size[::-1], Image.Resampling.BILINEAR)
        same = torch.tensor(np.asarray(resized)).permute(2, 0, 1)[None] / 255
        assert float(Similarity(file)(same)) == pytest.approx(0, abs=4e-3)


def test_similarity_prefers_what_is_near(file):
    picture = as_tensor(file)
    grey = (picture * torch.tensor([0.2126, 0.7152, 0.0722])[:, None, None]).sum(1, True)
    x = torch.cat([picture, 0.9 * picture, picture.flip(-1), 1 - picture])
    it, near, mirrored, negative = Similarity(file)(x).tolist()
    assert it == pytest.approx(0, abs=1e-6)
    assert it > near > mirrored > negative
    without_colour = grey.expand(1, 3, -1, -1)
    assert float(Similarity(file, by="luma")(without_colour)) == pytest.approx(0, abs=1e-5)
    assert float(Similarity(file)(without_colour)) < -0.1


def test_transparent_is_white(tmp_path):
    Image.new("RGBA", (4, 4)).save(tmp_path / "empty.png")
    x = torch.stack([torch.ones(3, 8, 8), torch.zeros(3, 8, 8)])
    found = Similarity(tmp_path / "empty.png")(x).tolist()
    assert found == pytest.approx([0, -1], abs=2e-4)


def test_similarity_says_what_is_wrong(file):
    with pytest.raises(ValueError, match="needs the option 'image'"):
        rewards.load("similarity")
    with pytest.raises(FileNotFoundError, match=r"no file 'cat\.png'.*image=picture\.png"):
        rewards.load("similarity:image=cat.png")
    with pytest.raises(ValueError, match=r"value of by 'color': did you mean colour.*luma"):
        rewards.load(f"similarity:image={file},by=color")
