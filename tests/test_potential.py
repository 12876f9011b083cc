import pytest
import torch

import steer
from steer.guidance.potential import Denoised, Lookahead, Naive, Terminal
from tests.test_flow import ByVelocity, mixture

VIEWS = [Lookahead, Denoised, Naive]
every_view = pytest.mark.parametrize("view", VIEWS, ids=lambda v: v.__name__)


def smooth(images):
    return torch.tanh(images).sum(1) + 0.3 * images[:, 0] ** 2


def points(n=5):
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def square(t):
    return t**2


@every_view
@pytest.mark.parametrize("ramp", [None, square])
def test_value_is_the_ramped_reward_of_the_view(view, ramp):
    flow, x, t = mixture(), points(), 0.6
    seen = {
        Lookahead: flow.lookahead(x, t), Denoised: flow.denoise(x, t), Naive: x,
    }[view]  # fmt: skip
    g = 0.6 if ramp is None else 0.36
    potential = view(flow, smooth, temperature=0.5, ramp=ramp)
    assert torch.allclose(potential(x, t), g * smooth(seen) / 0.5)
    assert torch.allclose(potential(x, 1.0), smooth(x) / 0.5)
    assert torch.equal(potential(x, 0.0), torch.zeros(5, dtype=x.dtype))


@every_view
@pytest.mark.parametrize("closed", [True, False])
def test_gradient_by_finite_differences(view, closed):
    flow, x, t, h = mixture(), points(), 0.6, 1e-5
    potential = view(flow if closed else ByVelocity(flow), smooth, temperature=0.5)
    value, gradient = potential.gradient(x, t)
    assert torch.allclose(value, potential(x, t))
    for i in range(3):
        e = torch.zeros(3, dtype=x.dtype)
        e[i] = h
        slope = (potential(x + e, t) - potential(x - e, t)) / (2 * h)
        assert torch.allclose(gradient[:, i], slope, rtol=1e-4, atol=1e-5)


@every_view
@pytest.mark.parametrize("t", [0.0, 0.5])
def test_rate_is_the_derivative_along_the_flow(view, t):
    """`(∂_t + b·∇) r_t`: the difference quotient of r along the probability flow."""
    flow, x, h = ByVelocity(mixture()), points(), 1e-4
    potential = view(flow, smooth, temperature=0.5, ramp=lambda t: (t + t**2) / 2)
    rate = potential.rate(x, t, flow.velocity(x, t))
    ahead = potential(flow.jump(x, t, t + h), t + h)
    behind = potential(x, t)
    half = potential(flow.jump(x, t, t + h / 2), t + h / 2)
    slope = (4 * half - ahead - 3 * behind) / h  # second order, forwards
    assert torch.allclose(rate, slope, rtol=5e-3, atol=5e-3)


def test_lookahead_through_more_jumps():
    flow, x = mixture(), points()
    one, four = (Lookahead(flow, smooth, steps=k)(x, 0.3) for k in (1, 4))
    assert torch.allclose(one, four, atol=1e-3)
    assert not torch.equal(one, four)


def test_terminal_is_zero_until_the_end():
    def never(images):
        raise AssertionError("the reward was asked before t = 1")

    x = points()
    assert torch.equal(Terminal(mixture(), never)(x, 0.9), torch.zeros(5, dtype=x.dtype))
    value, gradient = Terminal(mixture(), smooth).gradient(x, 0.5)
    assert not value.any()
    assert not gradient.any()
    assert torch.allclose(Terminal(mixture(), smooth, temperature=2.0)(x, 1.0), smooth(x) / 2)


def test_temperatures_and_prompts_are_prompt_major():
    asked = []

    def reward(images, prompts):
        asked.append(prompts)
        return images[:, 0]

    x = points(4)
    potential = Naive(mixture(), reward, ["a", "b"], torch.tensor([1.0, 2.0]))
    assert torch.allclose(potential(x, 1.0), x[:, 0] / torch.tensor([1, 1, 2, 2]))
    assert asked[-1] == ["a", "a", "b", "b"]
    per_row = Naive(mixture(), smooth, temperature=torch.tensor([1.0, 2, 3, 4]))
    assert torch.allclose(per_row(x, 1.0), smooth(x) / torch.tensor([1, 2, 3, 4]))


def test_errors_name_the_mend():
    flow, x = mixture(), points()
    with pytest.raises(ValueError, match="above zero"):
        Lookahead(flow, smooth, temperature=0.0)
    with pytest.raises(ValueError, match="at least 1"):
        Lookahead(flow, smooth, steps=0)
    with pytest.raises(ValueError, match="one number per image"):
        Naive(flow, lambda images: images)(x, 1.0)
    with pytest.raises(ValueError, match="returned float"):
        Naive(flow, lambda images: 3.0)(x, 1.0)
    blind = steer.reward.wrap(smooth, differentiable=False)
    with pytest.raises(ValueError, match="'split'"):
        Lookahead(flow, blind).gradient(x, 0.5)
    with pytest.raises(ValueError, match="carry no gradient"):
        Lookahead(flow, lambda images: images.detach().sum(1)).gradient(x, 0.5)


def test_halves_score_in_single():
    flow = mixture()
    assert Naive(flow, smooth)(points().bfloat16(), 1.0).dtype == torch.float32
