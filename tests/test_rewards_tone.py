"""Contrast, saturation, sharpness and smoothness are their formulas and order pictures so."""

import numpy as np
import pytest
import torch

import rewards
from rewards.pixels.tone import Contrast, Saturation, Sharpness, Smoothness
from rewards.testing import RewardContract


class TestContrast(RewardContract):
    def create_reward(self):
        return Contrast()


class TestSaturation(RewardContract):
    def create_reward(self):
        return Saturation()


class TestSharpness(RewardContract):
    def create_reward(self):
        return Sharpness()


class TestSmoothness(RewardContract):
    def create_reward(self):
        return Smoothness()


def noise(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(4))


def slow_luma(image):
    return np.tensordot([0.2126, 0.7152, 0.0722], image.double().numpy(), 1)


def chessboard(size):
    return (torch.arange(size)[:, None] + torch.arange(size)).remainder(2).expand(3, -1, -1)


def test_contrast_is_the_deviation_of_luma():
    images = noise(3, 3, 5, 4)
    expected = [slow_luma(x).std() for x in images]
    assert Contrast()(images).tolist() == pytest.approx(expected, abs=2e-4)


def test_contrast_orders_pictures():
    x = torch.full((4, 3, 8, 8), 0.5)
    x[1, :, 2:6, 2:6] = 0.7
    x[2, :, 2:6, 2:6] = 1.0
    x[3, :, :4], x[3, :, 4:] = 0, 1
    plain, weak, strong, most = Contrast()(x).tolist()
    assert plain == pytest.approx(0, abs=1e-6)
    assert plain < weak < strong < most
    assert most == pytest.approx(0.5, abs=1e-3)


def test_saturation_is_the_formula():
    images = noise(2, 3, 4, 4)
    images[:, :, :2] = 0.8 + 0.2 * images[:, :, :2]  # some of it pale, some of it ground
    for image, found in zip(images, Saturation()(images), strict=True):
        total, weights = 0.0, 0.05 * 16
        for pixel in image.flatten(1).T.tolist():
            weight = min(1.0, (1 - min(pixel)) / 0.25)
            total += weight * (max(pixel) - min(pixel))
            weights += weight
        assert float(found) == pytest.approx(total / weights, abs=1e-5)


def test_saturation_is_of_the_drawing_not_of_its_size():
    x = torch.ones(6, 3, 16, 16)
    dark_red, pink, grey = [0.5, 0.1, 0.1], [1, 0.7, 0.8], [0.4, 0.4, 0.4]
    for k, rgb in enumerate([[1, 0, 0], dark_red, pink, grey]):
        x[k, :, 3:13, 3:13] = torch.tensor(rgb, dtype=torch.float)[:, None, None]
    x[5, 1:] = 0  # red all over; x[4] stays white
    vivid, dark, pale, colourless, empty, large = Saturation()(x).tolist()
    assert vivid > dark > pale > colourless
    assert colourless == pytest.approx(0, abs=1e-6)
    assert empty == 0
    assert vivid > 0.85
    assert large - vivid < 0.1


def test_sharpness_is_the_rms_laplacian():
    images = noise(3, 3, 5, 4)
    for image, found in zip(images, Sharpness()(images), strict=True):
        y, total = slow_luma(image), 0.0
        for i in range(5):
            for j in range(4):
                around = [(i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1)]
                near = [y[a, b] if 0 <= a < 5 and 0 <= b < 4 else y[i, j] for a, b in around]
                total += (sum(near) / 4 - y[i, j]) ** 2 / 20
        assert float(found) == pytest.approx(total**0.5, abs=2e-4)


def test_sharpness_prefers_sharp_edges():
    x = torch.zeros(4, 3, 12, 12)
    x[1] = torch.linspace(0, 1, 12)
    x[2] = torch.tensor([0.0] * 4 + [0.2, 0.4, 0.6, 0.8] + [1.0] * 4)
    x[3, ..., 6:] = 1
    plain, ramp, soft, sharp = Sharpness()(x).tolist()
    assert plain == pytest.approx(0, abs=1e-6)
    assert plain < ramp < soft < sharp / 2
    most = float(Sharpness()(chessboard(64)[None].float()))
    assert 0.95 < most <= 1


def test_smoothness_is_minus_the_total_variation():
    images = noise(3, 3, 5, 4)
    for image, found in zip(images, Smoothness()(images), strict=True):
        a = image.double().numpy()
        total = np.abs(a[:, 1:] - a[:, :-1]).sum() + np.abs(a[..., 1:] - a[..., :-1]).sum()
        assert float(found) == pytest.approx(-total / (6 * 20), abs=1e-5)


def test_smoothness_prefers_plain_pictures_and_few_edges():
    x = torch.ones(4, 3, 16, 16)
    x[1, :, 4:12, 4:12] = 0
    x[2, ..., ::4] = 0
    x[3] = chessboard(16)
    plain, square, stripes, chess = Smoothness()(x).tolist()
    assert plain == 0
    assert plain > square > stripes > chess
    assert -1 <= chess < -0.9
    soft = x[1:2].clone()
    soft[:, :, 3:13, 3:4] = soft[:, :, 3:13, 12:13] = 0.5
    assert float(Smoothness()(soft)) > stripes


def test_they_take_no_options():
    for name in ["contrast", "saturation", "sharpness", "smoothness"]:
        with pytest.raises(ValueError, match="no option 'by': it has none"):
            rewards.load(f"{name}:by=2")
