import pytest
import torch

from steer.guidance.resampler import (
    _invert,
    ess,
    log_mean_exp,
    multinomial,
    residual,
    stratified,
    systematic,
)
from steer.noise import generator

ALL = [systematic, stratified, residual, multinomial]
every_resampler = pytest.mark.parametrize("resample", ALL, ids=lambda f: f.__name__)


@every_resampler
def test_unbiased(resample):
    """Particle i survives n W_i times in expectation: within 4 standard errors of 2,000 draws."""
    log_w = torch.tensor([0.1, -1.3, 2.0, 0.7, -torch.inf, 0.0])
    n, runs = len(log_w), 2000
    counts = torch.stack(
        [torch.bincount(resample(log_w, generator(i)), minlength=n) for i in range(runs)]
    ).double()
    error = (counts.mean(0) - n * log_w.softmax(0)).abs()
    assert (error <= 4 * counts.std(0) / runs**0.5 + 1e-6).all()
    assert counts[:, 4].sum() == 0


@pytest.mark.parametrize("resample", [systematic, residual], ids=lambda f: f.__name__)
def test_low_variance(resample):
    """Systematic and residual keep at least the whole copies that a particle is due."""
    log_w = torch.randn(50, generator=generator("w"))
    counts = torch.bincount(resample(log_w, generator(0)), minlength=50)
    assert (counts >= (50 * log_w.double().softmax(0)).floor()).all()


@every_resampler
def test_a_sum_of_float32_weights_below_one(resample):
    """The float32 running sum of these weights ends below 1: no index may fall off the end."""
    log_w = torch.full((100_003,), -3.0)
    log_w[-1] = -torch.inf
    assert float(log_w.softmax(0).cumsum(0)[-1]) != 1.0
    index = resample(log_w, generator(1))
    assert int(index.max()) < 100_002
    assert len(index) == 100_003


@every_resampler
def test_seeded(resample):
    log_w = torch.randn(20, generator=generator("v"))
    draws = [resample(log_w, generator(s)) for s in range(10)]
    assert torch.equal(draws[0], resample(log_w, generator(0)))
    assert any(not torch.equal(draws[0], d) for d in draws[1:])


def test_ess_and_mean():
    assert float(ess(torch.tensor([0.0, -torch.inf]))) == pytest.approx(1)
    assert float(ess(torch.full((4,), 500.0))) == pytest.approx(4)
    log_w = torch.tensor([[1.0, 2.0], [800.0, 800.0]])
    expected = [float(log_w[0].exp().mean().log()), 800.0]
    assert log_mean_exp(log_w).tolist() == pytest.approx(expected, rel=1e-6)


def test_a_point_on_an_edge_belongs_to_the_particle_above():
    """A uniform of exactly 0 must not choose a first particle of weight zero."""
    log_w = torch.tensor([-torch.inf, 0.0, -torch.inf, 0.0])
    points = torch.tensor([0.0, 0.25, 0.5], dtype=torch.float64)
    assert _invert(log_w, points).tolist() == [1, 1, 3]
