"""The increments, against their formulas and each other."""

import pytest
import torch

import steer
from steer.guidance.state import State
from steer.guidance.weights import Continuous, Ratio, Step, Weights
from tests.test_flow import mixture

VIEWS = [steer.Lookahead, steer.Denoised, steer.Naive]


def reward(x):
    return torch.tanh(x).sum(1)


def step(view=steer.Lookahead, first=False, s=0.4, t=0.5):
    flow = mixture()
    g = torch.Generator().manual_seed(0)
    x, x_next = (torch.randn(6, 3, generator=g, dtype=torch.float64) for _ in range(2))
    log_ratio = torch.randn(6, generator=g, dtype=torch.float64)
    here = State(x, s, flow, view(flow, reward, temperature=0.3))
    return Step(here, here.at(x_next, t), log_ratio, first)


@pytest.mark.parametrize("view", [*VIEWS, steer.Terminal])
def test_ratio(view):
    one = step(view)
    expected = one.there.potential(one.there.x, 0.5) - one.here.potential(one.here.x, 0.4) + one.log_ratio
    assert torch.allclose(Ratio()(one), expected)


def test_the_start_counts_as_zero():
    one = step(first=True)
    assert torch.allclose(Ratio()(one), one.there.potential(one.there.x, 0.5) + one.log_ratio)


@pytest.mark.parametrize("view", VIEWS)
def test_continuous_is_the_step_times_the_rate(view):
    one = step(view)
    rate = one.here.potential.rate(one.here.x, 0.4, one.here.flow.velocity(one.here.x, 0.4))
    assert torch.allclose(Continuous()(one), 0.1 * rate)


def test_continuous_is_the_published_one():
    """With the lookahead: `(t - s) R(X(s,1,x))`."""
    one = step()
    expected = 0.1 * reward(one.here.flow.lookahead(one.here.x, 0.4)) / 0.3
    assert torch.allclose(Continuous()(one), expected)


@pytest.mark.parametrize("view", VIEWS)
def test_along_the_flow_both_rules_agree_to_second_order(view):
    """Without noise the ratio is the rate's integral: the gap falls fourfold as h halves."""
    flow = mixture()
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    potential = view(flow, reward, temperature=0.3, ramp=lambda t: t**2)
    gaps = []
    for h in (0.02, 0.01):
        y, zero = flow._integrate(x, *(torch.tensor(c).double() for c in (0.4, 0.4 + h)), 3000), 0
        here = State(x, 0.4, flow, potential)
        one = Step(here, here.at(y, 0.4 + h), torch.full((6,), float(zero)))
        gaps.append((Ratio()(one) - Continuous()(one)).abs().sum())
    assert 3 < float(gaps[0] / gaps[1]) < 5


def test_abstract():
    with pytest.raises(NotImplementedError):
        Weights()(step())
