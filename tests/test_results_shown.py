"""Pictures as people use them: PIL images, and a result that shows itself in a notebook."""

import io

import pytest
import torch
from PIL import Image

import steer
from steer.pictures import captioned_grid, side_of


class Pixels(steer.FlowMap):
    """Noise as pictures of another shape than a square."""

    def __init__(self, shape=(3, 40, 20)):
        super().__init__()
        self.path, self.event_shape = steer.Linear(), shape

    def velocity(self, x, t):
        return -x

    def jump(self, x, s, t):
        return x + (t - s) * self.velocity(x, s)

    def given(self, prompts):
        return self


def drawn(prompts):
    return steer.sample(
        Pixels(), lambda images: images.mean((1, 2, 3)), prompts=prompts, method="none", steps=1,
        particles=3,
    )  # fmt: skip


def test_pictures_by_prompt():
    result = drawn(["a", "b"])
    assert [len(row) for row in result.pil] == [3, 3]
    best = result.pil[0][result.best[0]]
    assert best.size == (20, 40)
    wanted = result.images[0, result.best[0]].clamp(0, 1).mul(255).round().byte()
    assert torch.equal(torch.tensor(list(best.getdata())).T.reshape(3, 40, 20), wanted)


def test_pictures_of_one_prompt_and_of_none():
    assert [image.size for image in drawn("a").pil] == [(20, 40)] * 3
    assert [image.size for image in drawn(None).pil] == [(20, 40)] * 3


def test_a_result_shows_itself():
    shown = Image.open(io.BytesIO(drawn(["a", "b"])._repr_png_()))
    assert shown.format == "PNG"
    assert shown.height > 2 * 96


def test_what_has_no_pixels_shows_nothing():
    flow = steer.GaussianMixture(torch.zeros(1, 2), 1.0)
    result = steer.sample(flow, lambda x: x[:, 0], method="none", steps=1)
    assert result._repr_png_() is None
    with pytest.raises(ValueError, match="no pixels"):
        result.pil  # noqa: B018


def test_grids_keep_the_shape_of_pictures():
    tall = torch.zeros(1, 3, 40, 20)  # black
    grid = captioned_grid([("", tall, [""])], 80).crop((6, 6, 86, 86))
    black = [grid.getpixel((x, 40)) == (0, 0, 0) for x in range(80)]
    assert sum(black) == 40
    assert black[40]
    assert not black[5]


def test_large_pictures_are_shown_larger():
    assert side_of(torch.zeros(1, 3, 32, 32)) == 96
    assert side_of(torch.zeros(1, 3, 512, 640)) == 256
