import warnings

import pytest
import torch

from steer.models.two_time import NetworkFlow, TwoTimeUNet
from steer.models.words import BagOfWords

WORDS = ["apple", "red", "green", "animal", "fox"]


@pytest.fixture
def flow():
    torch.manual_seed(0)
    net = TwoTimeUNet(WORDS, (8, 8, 16), (1, 1, 1), size=16, width=16, groups=4)
    with torch.no_grad():  # the zero-initialised layers would hide everything
        for p in net.parameters():
            p.add_(0.15 * torch.randn(p.shape))
    return NetworkFlow(net).eval()


@pytest.fixture
def x():
    return torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def test_jump_is_the_identity_where_the_times_meet(flow, x):
    for s in (0.0, 0.3, torch.tensor(1.0), torch.rand(6)):
        assert torch.equal(flow.jump(x, s, s), x)


def test_the_time_derivative_of_the_jump_is_the_velocity_on_the_diagonal(flow, x):
    for s in (0.0, 0.4, 1.0):
        t = torch.tensor(s, requires_grad=False)
        _, rate = torch.func.jvp(lambda t, s=s: flow.jump(x, s, t), (t,), (torch.ones(()),))
        torch.testing.assert_close(rate, flow.velocity(x, s), atol=1e-5, rtol=1e-4)


def test_the_map_depends_on_both_times_and_has_gradients_in_x_and_t(flow, x):
    assert not torch.allclose(flow.mean_velocity(x, 0.2, 0.2), flow.mean_velocity(x, 0.2, 0.9))
    assert not torch.allclose(flow.mean_velocity(x, 0.2, 0.2), flow.mean_velocity(x, 0.3, 0.3))
    x, t = x.requires_grad_(), torch.full((6,), 0.7, requires_grad=True)
    flow.jump(x, 0.1, t).square().sum().backward()
    assert x.grad.abs().sum() > 0
    assert (t.grad.abs() > 0).all()


def test_times_may_be_floats_scalars_or_one_a_row(flow, x):
    expected = flow.jump(x, 0.25, 0.75)
    for s, t in [
        (torch.tensor(0.25), torch.tensor(0.75)),
        (torch.full((6,), 0.25), 0.75),
        (0.25, torch.full((6,), 0.75, dtype=torch.float64)),
    ]:
        torch.testing.assert_close(flow.jump(x, s, t), expected)


def test_prompts_are_bound_prompt_major_and_share_the_parameters(flow, x):
    bound = flow.given(["red apple", "fox"])
    v = bound.velocity(x, 0.5)
    torch.testing.assert_close(v[:3], flow.given(["red apple"]).velocity(x[:3], 0.5))
    torch.testing.assert_close(v[3:], flow.given(["fox"]).velocity(x[3:], 0.5))
    assert not torch.allclose(v[:3], flow.given(["fox"]).velocity(x[:3], 0.5))
    assert next(bound.parameters()) is next(flow.parameters())
    torch.testing.assert_close(flow.velocity(x, 0.5), flow.given([""]).velocity(x, 0.5))
    with pytest.raises(ValueError, match="do not split evenly over 2 prompts"):
        bound.velocity(x[:5], 0.5)


def test_binding_does_not_touch_the_flow_that_was_bound(flow, x):
    before = flow.velocity(x, 0.5)
    flow.given(["fox"]).network = None
    assert torch.equal(flow.velocity(x, 0.5), before)


def test_unknown_words_are_dropped_with_a_warning_that_names_them(flow, x):
    with pytest.warns(UserWarning, match=r"'shiny'.*the rest is still used"):
        bound = flow.given(["a shiny red apple"])
    assert torch.equal(bound.velocity(x, 0.5), flow.given(["red apple"]).velocity(x, 0.5))
    with pytest.warns(UserWarning, match="acts as the empty prompt"):
        bound = flow.given(["spaceship"])
    assert torch.equal(bound.velocity(x, 0.5), flow.velocity(x, 0.5))


def test_order_articles_and_plurals_do_not_matter():
    words = BagOfWords(["apple", "cherries", "red"], 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert words.parse("the red apples")[0] == [3, 1]
    assert words.parse("a cherry")[0] == [2]
    same = words(words.tokens(["red apple", "apple RED"]))
    torch.testing.assert_close(same[0], same[1])


def test_no_prompts_and_a_bare_string_are_refused(flow):
    with pytest.raises(ValueError, match="no prompts to bind"):
        flow.given([])
    with pytest.raises(TypeError, match="prompts are a list"):
        flow.given("fox")


def test_micro_batches_and_precisions_agree(flow, x):
    bound = flow.given(["fox"])
    whole = bound.jump(x, 0.0, 1.0)
    parts = torch.cat([bound.jump(part, 0.0, 1.0) for part in x.split(2)])
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-4)
    double = flow.double().given(["fox"]).jump(x.double(), 0.0, 1.0)
    torch.testing.assert_close(double.float(), whole, atol=1e-3, rtol=1e-3)
    assert double.dtype == torch.float64
    flow.float()
    with torch.autocast("cpu", torch.bfloat16):
        half = bound.jump(x, 0.0, 1.0)
    assert half.dtype == torch.float32
    assert float((half - whole).square().mean().sqrt() / whole.std()) < 0.05


def test_decode_maps_to_the_unit_interval_without_clamping(flow):
    x = torch.tensor([-1.0, 1.0, 1.5])
    torch.testing.assert_close(flow.decode(x), torch.tensor([0.0, 1.0, 1.25]))
