from functools import cache

import pytest
import torch

import steer
from steer.flow import flat_prompts, log_dtype, per_row
from steer.testing import FlowMapContract


@cache  # its calibration takes longer than most tests
def mixture(path=None, d=3, full=True):
    g = torch.Generator().manual_seed(3)
    a = torch.randn(2, d, d, generator=g)
    cov = a @ a.mT / d + 0.3 * torch.eye(d) if full else torch.tensor([0.3, 0.8])
    means = torch.randn(2, d, generator=g)
    return steer.GaussianMixture(means, cov, torch.tensor([1.0, 2.0]), path)


class TestLinear(FlowMapContract):
    def create_flow(self):
        return mixture()


class TestCosine(FlowMapContract):
    def create_flow(self):
        return mixture(steer.Cosine(), full=False)


class TestVariancePreserving(FlowMapContract):
    def create_flow(self):
        return mixture(steer.VariancePreserving())


class ByVelocity(steer.FlowMap):
    """A mixture of which the base class knows the velocity alone."""

    def __init__(self, exact):
        super().__init__()
        self.exact, self.path, self.event_shape = exact, exact.path, exact.event_shape

    def velocity(self, x, t):
        return self.exact.velocity(x, t)

    def jump(self, x, s, t):
        return self.exact.jump(x, s, t)


@pytest.mark.parametrize("path", [steer.Linear(), steer.Cosine(), steer.VariancePreserving()])
def test_round_trip_of_velocity_denoiser_and_score(path):
    """The base class's conversions equal the closed forms, in float64, also with a time a row."""
    exact = mixture(path)
    flow = ByVelocity(exact)
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for t in (0.0, 0.3, 0.95, torch.linspace(0.05, 0.95, 8, dtype=torch.float64)):
        assert torch.allclose(flow.denoise(x, t), exact.denoise(x, t), atol=1e-8)
        assert torch.allclose(flow.score(x, t), exact.score(x, t), atol=1e-6)
    assert torch.equal(flow.denoise(x, 1.0), x)
    t = torch.linspace(0.3, 1.0, 8, dtype=torch.float64)  # the last row has arrived
    assert torch.equal(flow.denoise(x, t)[-1], x[-1])
    assert torch.allclose(flow.denoise(x, t)[:-1], exact.denoise(x, t)[:-1], atol=1e-8)
    assert flow.log_prob(x) is None
    assert flow.given(["a", "b"]) is flow
    assert flow.decode(x) is x


def test_rows_are_prompt_major():
    assert flat_prompts(["a", "b"], 6) == ["a"] * 3 + ["b"] * 3
    assert per_row(torch.tensor([1.0, 2.0]), 4).tolist() == [1, 1, 2, 2]
    with pytest.raises(ValueError, match="prompt-major"):
        per_row(torch.tensor([1.0, 2.0]), 5)


def test_weights_are_summed_in_doubles_where_there_are_any():
    assert log_dtype(torch.device("cpu")) == torch.float64
    assert log_dtype(torch.device("mps")) == torch.float32
