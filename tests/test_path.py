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
