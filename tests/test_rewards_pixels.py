"""What every reward of pixels owes: any size and type, finite gradients, true ones."""

import numpy as np
import pytest
import torch
from PIL import Image

import rewards
from rewards.pixels.reading import LARGEST, read
from steer.reward import score

SPECS = [
    "contrast",
    "saturation",
    "sharpness",
    "smoothness",
    "symmetry",
    "symmetry:axis=horizontal",
    "antisymmetry",
    "antisymmetry:axis=horizontal",
    "layout:region=left",
    "layout:region=centre",
    "layout:mask={folder}/mask.png",
    "similarity:image={folder}/colour.png",
    "similarity:image={folder}/colour.png,by=luma",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A reference picture and a mask."""
    path = tmp_path_factory.mktemp("pictures")
    g = torch.Generator().manual_seed(3)
    pixels = torch.randint(256, (7, 9, 3), generator=g, dtype=torch.uint8).numpy()
    Image.fromarray(pixels).save(path / "colour.png")
    Image.fromarray(pixels[..., 0]).save(path / "mask.png")
    return path


@pytest.fixture(params=SPECS)
def reward(request, folder):
    return rewards.load(request.param.format(folder=folder))


def pictures(*shape, dtype=torch.float32):
    """Ink all over, away from the kinks of clamp and weight."""
    x = torch.rand(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return (0.05 + 0.65 * x).to(dtype)


def test_gradient_is_the_finite_difference(reward):
    x = pictures(2, 3, 5, 6, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(reward, x, eps=1e-7, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [(1, 1), (1, 5), (4, 1), (9, 6)])
def test_any_size_and_type(reward, size, dtype):
    x = pictures(2, 3, *size, dtype=dtype).requires_grad_()
    scores = score(reward, x)
    assert scores.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.allclose(scores.double(), reward(x.double()), atol=1e-5)
    (gradient,) = torch.autograd.grad(scores.sum(), x)
    assert gradient.dtype == dtype
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_plain_pictures_have_finite_scores_and_gradients(reward, dtype):
    grey = torch.tensor([0.0, 0.25, 0.5, 1.0, 2.0], dtype=dtype)
    x = grey[:, None, None, None].expand(5, 3, 8, 8).clone().requires_grad_()
    scores = reward(x)
    assert torch.isfinite(scores).all()
    (gradient,) = torch.autograd.grad(scores.sum(), x)
    assert torch.isfinite(gradient).all()


def test_scores_stay_in_their_range(reward, folder):
    low, high = {
        "Contrast": (0, 0.5),
        "Saturation": (0, 1),
        "Sharpness": (0, 1),
        "Smoothness": (-1, 0),
        "Symmetry": (-1, 0),
        "Antisymmetry": (0, 1),
        "Layout": (0, 1),
        "Similarity": (-1, 0),
    }[type(reward).__name__]
    x = 4 * torch.rand(50, 3, 8, 8, generator=torch.Generator().manual_seed(1)) - 1.5
    x[:3] = torch.tensor([0.0, 0.5, 1.0])[:, None, None, None]
    x[3] = (torch.arange(8)[:, None] + torch.arange(8)).remainder(2)
    scores = reward(x)
    assert float(scores.min()) >= low - 1e-6
    assert float(scores.max()) <= high + 1e-6


def test_read_lays_transparent_pictures_on_a_ground(tmp_path):
    Image.new("RGBA", (2, 1), (255, 0, 0, 128)).save(tmp_path / "pale.png")
    half = 128 / 255
    for ground, rest in [(1.0, 1 - half), (0.0, 0.0)]:
        found = read(tmp_path / "pale.png", "image", ground)
        assert found.shape == (1, 3, 1, 2)
        assert found[0, :, 0, 0].tolist() == pytest.approx([half + rest, rest, rest])


def test_read_keeps_every_kind_of_picture(tmp_path):
    grey = Image.frombytes("L", (3, 2), bytes([0, 51, 102, 153, 204, 255]))
    expected = torch.tensor([[0, 0.2, 0.4], [0.6, 0.8, 1]]).expand(1, 3, 2, 3)
    for mode in ["L", "RGB", "RGBA", "LA", "P"]:
        grey.convert(mode).save(tmp_path / "picture.png")
        assert torch.allclose(read(tmp_path / "picture.png", "image"), expected), mode
    turned = grey.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned to the right
    turned.save(tmp_path / "picture.png", exif=exif)
    assert torch.allclose(read(tmp_path / "picture.png", "image"), expected)
    Image.new("L", (3 * LARGEST, LARGEST)).save(tmp_path / "large.png")
    assert read(tmp_path / "large.png", "image").shape == (1, 3, LARGEST // 3, LARGEST)


def test_read_says_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*give .* image=picture\.png"):
        read(tmp_path / "none.png", "image")
    with pytest.raises(FileNotFoundError, match="no file"):
        read(tmp_path, "image")
    (tmp_path / "text.png").write_text("hello")
    Image.effect_noise((64, 64), 50).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    Image.new("F", (2, 2), 0.5).save(tmp_path / "deep.png", "TIFF")
    Image.new("I", (2, 2), 40000).save(tmp_path / "whole32.png", "TIFF")
    for name, word in [
        ("text", "identify"), ("cut", "truncated"), ("deep", "more than 16 bits"),
        ("whole32", "more than 16 bits"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=f"{word}.*Save it as a PNG or JPEG"):
            read(tmp_path / f"{name}.png", "mask")


def test_grey_of_16_bits_is_divided_by_65535(tmp_path):
    values = np.array([[0, 1, 13107], [40000, 65534, 65535]], np.uint16)
    expected = torch.tensor(values.astype(np.float32) / 65535).expand(1, 3, 2, 3)
    for name in ("deep.png", "deep.tif"):
        Image.fromarray(values).save(tmp_path / name)
        assert Image.open(tmp_path / name).mode.startswith("I"), name
        assert torch.equal(read(tmp_path / name, "image"), expected), name
    Image.fromarray(values.astype(">u2")).save(tmp_path / "big.tif")
    assert torch.equal(read(tmp_path / "big.tif", "image"), expected)
    Image.fromarray(values).save(tmp_path / "clear.png", transparency=13107)
    assert read(tmp_path / "clear.png", "image", ground=0.25)[0, 0].flatten().tolist() == (
        pytest.approx([0, 1 / 65535, 0.25, 40000 / 65535, 65534 / 65535, 1])
    )
    Image.fromarray(values.repeat(LARGEST, 0)).save(tmp_path / "tall.png")
    tall = read(tmp_path / "tall.png", "image")
    assert tall.shape[2] == LARGEST
    assert 0 <= float(tall.min()) <= float(tall.max()) <= 1
