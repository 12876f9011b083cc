"""Controls change a gradient and never a value; with ratio weights never the law."""

import pytest
import torch

import steer
from steer.guidance.control import Braked, Clipped, Normalised, Window, Windowed, controlled
from tests.test_flow import mixture


def reward(x):
    return torch.tanh(x).sum(1)


def view(**options):
    return steer.Lookahead(mixture(), reward, temperature=0.3, **options)


X = torch.randn(12, 3, generator=torch.Generator().manual_seed(1))
WRAPPERS = {
    "clipped": lambda p: Clipped(p, 0.7),
    "normalised": lambda p: Normalised(p, 2.0),
    "braked": lambda p: Braked(p, 0.2),
    "windowed": lambda p: Windowed(p, 0.0, 0.4),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_values_and_rewards_stay(name):
    plain, wrapped = view(), WRAPPERS[name](view())
    assert torch.equal(plain(X, 0.5), wrapped(X, 0.5))
    a = plain.evaluate(X, 0.5, derivatives=True)
    b = wrapped.evaluate(X, 0.5, derivatives=True)
    assert torch.equal(a.reward, b.reward)
    assert torch.equal(a.value, b.value)
    assert not torch.equal(a.gradient, b.gradient)
    assert wrapped.temperature == 0.3
    assert wrapped.differentiable


def test_each_row_is_clipped_or_normalised_by_itself():
    plain = view().gradient(X, 0.5)[1]
    norms = plain.norm(dim=1)
    clipped = Clipped(view(), float(norms.median())).gradient(X, 0.5)[1]
    expected = torch.stack([g * min(1.0, float(norms.median() / g.norm())) for g in plain])
    assert torch.allclose(clipped, expected, atol=1e-6)
    lengths = Normalised(view(), 2.0).gradient(X, 0.5)[1]
    assert torch.allclose(lengths.norm(dim=1), torch.full((12,), 2.0), atol=1e-5)
    assert torch.allclose(lengths / 2, plain / norms[:, None], atol=1e-5)


def test_a_changed_gradient_has_no_rate_but_the_potentials_own():
    """`∂_t r + b·g` with another g is nobody's rate; what is known without a gradient stays."""
    plain = steer.Denoised(mixture(), reward)
    for wrapped in (Clipped(plain, 0.1), Normalised(plain, 1.0), Braked(plain, 0.2)):
        seen = wrapped.evaluate(X, 0.5, derivatives=True)
        assert seen.gradient is not None
        with pytest.raises(ValueError, match="no derivatives"):
            seen.rate(X)
    rates = [p.evaluate(X, 0.5, derivatives=True).rate(X) for p in (view(), Clipped(view(), 0.1))]
    assert torch.equal(*rates)


def test_controls_apply_in_their_order():
    """Normalised first, then clipped: the shorter of the two; the brake holds whatever is left."""
    height = float(view().evaluate(X, 0.5).reward.median())
    for length, bound in ((2.0, 0.5), (0.5, 2.0)):
        options = {"normalise": length, "clip": bound}
        norms = controlled(view(), [0.5, 1.0], **options).gradient(X, 0.5)[1].norm(dim=1)
        assert torch.allclose(norms, torch.full((12,), 0.5), atol=1e-6)
        held = controlled(view(), [0.5, 1.0], brake=height, **options).gradient(X, 0.5)[1]
        assert torch.equal(held.any(1), view().evaluate(X, 0.5).reward < height)


def test_a_zero_gradient_stays_zero():
    flat = steer.Lookahead(mixture(), lambda x: 0 * x.sum(1))
    assert not Normalised(flat, 2.0).gradient(X, 0.5)[1].any()
    assert not Clipped(flat, 2.0).gradient(X, 0.5)[1].any()


def test_the_brake_stops_the_rows_that_are_there():
    seen = view().evaluate(X, 0.5)
    height = float(seen.reward.median())
    gradient = Braked(view(), height).gradient(X, 0.5)[1]
    assert torch.equal(gradient.any(1), seen.reward < height)


def test_outside_its_window_no_gradient_is_computed():
    calls = []

    def watched(x):
        calls.append(x.requires_grad)
        return reward(x)

    potential = Windowed(steer.Lookahead(mixture(), watched), 0.2, 0.6)
    open_at = [t / 10 for t in range(10) if potential.gradient(X, t / 10)[1].any()]
    assert open_at == [0.2, 0.3, 0.4, 0.5]
    assert sum(calls) == 4


def test_guided_times():
    times = [k / 8 for k in range(9)]
    assert Window().times(times) == times[:-1]
    assert Window(0.25, 0.75).times(times) == [0.25, 0.375, 0.5, 0.625]
    assert Window(0.25, 1.0, 3).times(times) == [0.25, 0.625]
    potential = view()
    assert controlled(potential, times) is potential


@pytest.mark.parametrize(
    "options",
    [
        {"window": Window(0.1, 0.6)},
        {"window": Window(every=3)},
        {"clip": 0.5},
        {"normalise": 1.0},
        {"window": Window(0.0, 0.8, 2), "clip": 2.0},
    ],
    ids=str,
)
def test_the_law_stays(options):
    """log Z of 8 populations against the closed form: a control shapes the proposal alone."""
    flow, linear = mixture(), steer.LinearReward(torch.tensor([0.6, -0.3, 0.4]))
    _, log_z = flow.tilt(linear, 0.7)
    times = [k / 8 for k in range(9)]
    potential = controlled(steer.Lookahead(flow, linear, temperature=0.7), times, **options)
    guide = steer.Guidance(potential, steer.Jump(flow, 0.5), times=times, scale=1.0)
    x = torch.randn(8, 640, 3, generator=torch.Generator().manual_seed(0))
    ratio = (guide(x).log_z.double() - log_z).exp()
    error = float(ratio.std()) / 8**0.5
    assert error < 0.05
    assert abs(float(ratio.mean()) - 1) < 4 * error


def test_published_weights_refuse_a_control():
    with pytest.raises(ValueError, match=r"not wrapped.*Ratio"):
        steer.Guidance(Clipped(view(), 1.0), steer.Sde(mixture()), steer.Continuous(), scale=1.0)


def test_the_settled_last_step_is_the_jump():
    flow = mixture()
    noise = steer.Noise(0, particles=12)
    x, log_ratio = steer.Sde(flow, settle=True).propose(X, 0.75, 1.0, view(), 1.0, noise)
    assert torch.allclose(x, flow.jump(X, 0.75, 1.0))
    assert not log_ratio.any()
    noisy, _ = steer.Sde(flow, settle=True).propose(X, 0.5, 0.75, view(), 0.0, noise)
    assert (noisy - X).abs().min() > 0
