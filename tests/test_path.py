import pytest
import torch

from steer.path import Cosine, Linear, VariancePreserving, like

PATHS = [Linear(), Cosine(), VariancePreserving(), VariancePreserving(0.5, 5.0)]
every_path = pytest.mark.parametrize("path", PATHS, ids=lambda p: type(p).__name__)


@every_path
def test_ends(path):
    for t, expected in ((0.0, (1, 0)), (1.0, (0, 1))):
        assert [float(c) for c in path(t)] == pytest.approx(expected, abs=1e-12)


@every_path
def test_derivative_is_jvp(path):
    t = torch.linspace(0.01, 0.99, 23, dtype=torch.float64)
    _, slope = torch.func.jvp(lambda t: path(t), (t,), (torch.ones_like(t),))
    for found, expected in zip(path.derivative(t), slope, strict=True):
        assert torch.allclose(found, expected, rtol=1e-10)


@every_path
def test_shapes_and_monotony(path):
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    alpha, beta = path(t)
    assert alpha.shape == beta.shape == t.shape
    assert (alpha.diff() < 0).all()
    assert (beta.diff() > 0).all()
    assert path(0.5)[0].shape == ()
    assert float(path(0.5)[1]) == pytest.approx(float(beta[5]))


@pytest.mark.parametrize("path", [Cosine(), VariancePreserving()])
def test_variance_is_preserved(path):
    alpha, beta = path(torch.linspace(0, 1, 11, dtype=torch.float64))
    assert torch.allclose(alpha**2 + beta**2, torch.ones(11, dtype=torch.float64))


def test_bad_rates():
    with pytest.raises(ValueError, match="rate_min"):
        VariancePreserving(2.0, 1.0)


def test_times_that_do_not_fit():
    with pytest.raises(ValueError, match="one time per row"):
        like(torch.zeros(3), torch.zeros(4, 2))


@every_path
def test_coefficients_are_as_exact_in_float32(path):
    """Near t = 1 too, where alpha is small: relative to the same times in float64."""
    t = torch.tensor([0.0, 1e-3, 0.3, 0.9, 0.999, 0.9999, 0.99999])
    for single, double in zip(path(t), path(t.double()), strict=True):
        assert torch.allclose(single.double(), double, rtol=2e-6, atol=1e-7)
    for single, double in zip(path.derivative(t), path.derivative(t.double()), strict=True):
        assert torch.allclose(single.double(), double, rtol=5e-5, atol=1e-6)


@every_path
def test_pairs(path):
    """`slope` is the time derivative of `interpolate`; denoiser and score invert them."""
    g = torch.Generator().manual_seed(0)
    x_0, x_1 = (torch.randn(4, 3, generator=g, dtype=torch.float64) for _ in range(2))
    t = torch.full((4,), 0.4, dtype=torch.float64)
    x, slope = torch.func.jvp(lambda t: path.interpolate(x_0, x_1, t), (t,), (torch.ones_like(t),))
    assert torch.allclose(path.slope(x_0, x_1, t), slope, rtol=1e-9)
    assert torch.allclose(path.denoised(x, slope, t), x_1, atol=1e-9)
    assert torch.allclose(path.score(x, x_1, t), -x_0 / path(0.4)[0], atol=1e-9)


@every_path
@pytest.mark.parametrize(("u", "t"), [(0.7, 0.4), (1.0, 0.4), (0.4, 0.4), (0.0, 0.0), (1.0, 1.0)])
def test_renoising_keeps_the_marginals(path, u, t):
    """`k x_u + sqrt(v) z` has the coefficients of `x_t`."""
    k, v = path.renoise(u, t)
    (alpha_u, beta_u), (alpha_t, beta_t) = path(u), path(t)
    assert float(k * beta_u) == pytest.approx(float(beta_t), abs=1e-12)
    assert float(k**2 * alpha_u**2 + v) == pytest.approx(float(alpha_t**2), abs=1e-12)
