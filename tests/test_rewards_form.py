"""Symmetry, antisymmetry and layout are their formulas and order pictures as people would."""

import pytest
import torch
from PIL import Image

import rewards
from rewards.pixels.form import REGIONS, Antisymmetry, Layout, Symmetry
from rewards.testing import RewardContract


class TestSymmetry(RewardContract):
    def create_reward(self):
        return Symmetry()


class TestSymmetryTopToBottom(RewardContract):
    def create_reward(self):
        return Symmetry("horizontal")


class TestAntisymmetry(RewardContract):
    def create_reward(self):
        return Antisymmetry()


class TestLayout(RewardContract):
    def create_reward(self):
        return Layout("left")


class TestMask(RewardContract):
    @pytest.fixture(autouse=True)
    def _file(self, tmp_path):
        self.file = tmp_path / "mask.png"
        Image.linear_gradient("L").save(self.file)

    def create_reward(self):
        return Layout(mask=self.file)


def sheet(n=1, size=16):
    return torch.ones(n, 3, size, size)


def noise(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(2))


def grey(pixel):
    r, g, b = pixel
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


@pytest.mark.parametrize("axis", ["vertical", "horizontal"])
def test_symmetry_is_the_formula(axis):
    images = noise(2, 3, 4, 5)
    for image, found in zip(images.tolist(), Symmetry(axis)(images), strict=True):
        total = 0.0
        for c in range(3):
            for i in range(4):
                for j in range(5):
                    other = image[c][i][4 - j] if axis == "vertical" else image[c][3 - i][j]
                    total += (image[c][i][j] - other) ** 2 / 60
        assert float(found) == pytest.approx(-(total**0.5), abs=2e-4)


def test_symmetry_prefers_the_symmetric():
    x = sheet(3)
    x[0, :, 4:9, 5:11] = 0.2  # in the middle of the width
    x[1, :, 4:9, 6:12] = 0.2  # a pixel to the right
    x[2, :, 4:9, 9:15] = 0.2  # far to the right
    upright, near, far = Symmetry()(x).tolist()
    assert upright == pytest.approx(0, abs=1e-6)
    assert upright > near > far
    assert float(Symmetry("horizontal")(x)[0]) < -0.1
    assert torch.allclose(Symmetry("horizontal")(x.mT), Symmetry()(x))
    halves = torch.zeros(1, 3, 8, 8)
    halves[..., 4:] = 1
    assert float(Symmetry()(halves)) == pytest.approx(-1, abs=1e-3)


@pytest.mark.parametrize("axis", ["vertical", "horizontal"])
def test_antisymmetry_is_the_formula(axis):
    images = noise(2, 3, 4, 5)
    images[:, :, 1, :2] = images[:, :, 2, 3:] = 0.9
    for image, found in zip(images, Antisymmetry(axis)(images), strict=True):
        above, below = 0.0, 0.01 * 20
        for i in range(4):
            for j in range(5):
                there = (i, 4 - j) if axis == "vertical" else (3 - i, j)
                p, q = image[:, i, j].tolist(), image[:, there[0], there[1]].tolist()
                weight = max(min(1, (1 - min(p)) / 0.25), min(1, (1 - min(q)) / 0.25))
                odd, even = (grey(p) - grey(q)) ** 2, (grey(p) + grey(q) - 1) ** 2
                above, below = above + weight * odd, below + weight * (odd + even)
        assert float(found) == pytest.approx(above / below, abs=1e-5)


def test_antisymmetry_prefers_negatives():
    x = sheet(7)
    x[0, :, :, :8] = 0  # black beside white
    x[1, :, 4:12, 4:8] = 0.1  # a dark half of a square
    x[1, :, 4:12, 8:12] = 0.9  # and its light half
    x[2, :, 4:12, 4:8] = 0.3
    x[2, :, 4:12, 8:12] = 0.5
    x[3, :, 4:12, 4:12] = 0.1  # both halves dark
    x[4, :, 4:12, 4:12] = 0.5  # both halves mid-grey
    x[6] = 0  # black all over; x[5] stays white
    pure, good, weak, *rest = Antisymmetry()(x).tolist()
    assert pure > 0.95
    assert pure > good > 0.85 > weak > 0.3
    assert rest == pytest.approx([0, 0, 0, 0], abs=1e-6)
    assert torch.allclose(Antisymmetry("horizontal")(x.mT), Antisymmetry()(x))
    # the negative of a negative: noise beside its mirrored negative
    half = noise(1, 3, 8, 4)
    assert float(Antisymmetry()(torch.cat([half, 1 - half.flip(-1)], -1))) > 0.8


@pytest.mark.parametrize("make", [Symmetry, Antisymmetry])
def test_axes_have_names(make):
    with pytest.raises(ValueError, match=r"axis 'verticl': did you mean vertical\?.*horizontal"):
        make("verticl")
    with pytest.raises(ValueError, match=r"unknown axis '3'.*Known: horizontal, vertical"):
        make(3)


def test_layout_is_the_formula(tmp_path):
    images, mask = noise(2, 3, 4, 6), (noise(4, 6) * 255).byte()
    Image.fromarray(mask.numpy()).save(tmp_path / "mask.png")
    for image, found in zip(images, Layout(mask=tmp_path / "mask.png")(images), strict=True):
        above, below = 0.0, 0.01 * 24
        for i in range(4):
            for j in range(6):
                ink = 1 - min(image[:, i, j].tolist())
                above, below = above + ink * int(mask[i, j]) / 255, below + ink
        assert float(found) == pytest.approx(above / below, abs=1e-5)


def test_a_mask_is_resized_by_areas(tmp_path):
    """A mask of twice the size counts as its means over 2 x 2; what is transparent is outside."""
    big = (noise(8, 12) * 255).round()
    Image.fromarray(big.byte().numpy()).save(tmp_path / "big.png")
    small = (big / 255).view(4, 2, 6, 2).mean((1, 3))
    images = noise(2, 3, 4, 6)
    ink = 1 - images.amin(1)
    expected = (small * ink).sum((1, 2)) / (ink.sum((1, 2)) + 0.24)
    assert torch.allclose(Layout(mask=tmp_path / "big.png")(images), expected, atol=1e-5)
    clear = Image.new("RGBA", (4, 4), (255, 255, 255, 0))
    clear.paste((255, 255, 255, 255), (0, 0, 2, 4))
    clear.save(tmp_path / "clear.png")
    left = Layout(mask=tmp_path / "clear.png")(images)
    assert torch.allclose(left, Layout("left")(images), atol=1e-6)


@pytest.mark.parametrize("size", [16, 31])
def test_layout_knows_where_the_ink_is(size):
    side = size // 8
    x, far, mid = sheet(5, size), size - side, (size - side) // 2
    corners = {
        "left": (mid, 0), "right": (mid, far), "top": (0, mid), "bottom": (far, mid),
        "centre": (mid, mid),
    }  # fmt: skip
    for k, name in enumerate(REGIONS):
        i, j = corners[name]
        x[k, 0, i : i + side, j : j + side] = 0  # cyan
    found = {name: Layout(name)(x).tolist() for name in REGIONS}
    most = pytest.approx(side**2 / (side**2 + 0.01 * size**2), abs=1e-5)
    half = pytest.approx(found["centre"][4] / 2, abs=1e-5)
    assert found == {
        "left": [most, 0, half, half, half],
        "right": [0, most, half, half, half],
        "top": [half, half, most, 0, half],
        "bottom": [half, half, 0, most, half],
        "centre": [0, 0, 0, 0, most],
    }
    assert Layout("left")(sheet()).tolist() == [0]  # empty


def test_layout_says_what_to_give(tmp_path):
    with pytest.raises(ValueError, match=r"region=NAME \(left, .*centre\) or mask=FILE, got nei"):
        rewards.load("layout")
    with pytest.raises(ValueError, match="got both"):
        Layout("left", tmp_path / "mask.png")
    with pytest.raises(ValueError, match="unknown region 'center': did you mean centre"):
        rewards.load("layout:region=center")
    with pytest.raises(FileNotFoundError, match=r"mask=picture\.png"):
        rewards.load("layout:mask=nowhere.png")
    Image.new("L", (4, 4)).save(tmp_path / "black.png")
    with pytest.raises(ValueError, match="completely black: paint the inside white"):
        Layout(mask=tmp_path / "black.png")
