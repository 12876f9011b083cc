"""One-time models: every prediction gives the same flow, and what its jumps cost is counted."""

import pytest
import torch
from torch import nn

import steer
from steer.one_time import OneTime
from steer.sampling.forecast import plan
from steer.sampling.methods import TABLE
from steer.testing import OneJumpContract, VelocityContract

PATHS = [steer.Linear(), steer.Cosine(), steer.VariancePreserving()]
every_path = pytest.mark.parametrize("path", PATHS, ids=lambda p: type(p).__name__)
every_prediction = pytest.mark.parametrize("predicts", ["eps", "x0", "v", "velocity"])


def exact(path):
    return steer.GaussianMixture(torch.tensor([[-1.0, 0.0], [1.0, 0.5]]), 0.4, path=path)


class Trained(nn.Module):
    """The exact prediction of a mixture, with a parameter so that it is a network."""

    def __init__(self, path, predicts):
        super().__init__()
        self.flow, self.predicts = exact(path), predicts
        self.zero = nn.Parameter(torch.zeros(()))

    def forward(self, x, t):
        assert t.shape == x.shape[:1]
        if self.predicts == "velocity":
            return self.flow.velocity(x, t) + self.zero
        d = self.flow.denoise(x, t)
        alpha, beta = (c[:, None] for c in self.flow.path(t))
        eps = (x - beta * d) / alpha
        return {"x0": d, "eps": eps, "v": beta * eps - alpha * d}[self.predicts] + self.zero


def model(path, predicts, **options):
    return OneTime(Trained(path, predicts), path, (2,), predicts, **options)


def points(path, t):
    flow, g = exact(path), torch.Generator().manual_seed(0)
    return flow.jump(torch.randn(32, 2, generator=g), 0.0, t)


class Prompted(nn.Module):
    """A linear network that is moved by a condition."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x, t, condition):
        return self.layer(x) + condition


def encode_prompts(prompts):
    return torch.tensor([[float(len(p))] for p in prompts])


def test_prompts_are_encoded_once_and_repeated_for_the_particles():
    seen = []

    def encode(prompts):
        seen.append(prompts)
        return encode_prompts(prompts)

    flow = OneTime(Prompted(), steer.Linear(), (2,), "x0", None, encode_prompts=encode)
    x, bound = torch.randn(4, 2, generator=torch.Generator()), flow.given(["a", "abc"])
    assert seen == [["a", "abc"]]
    shift = torch.tensor([1.0, 1.0, 3.0, 3.0])[:, None]
    moved = bound.lookahead(x, 0.0) - flow.lookahead(x, 0.0)
    assert torch.allclose(moved, shift.expand(4, 2), atol=1e-6)
    assert seen == [["a", "abc"], [""]]
    assert list(flow.state_dict()) == ["network.layer.weight", "network.layer.bias"]


@pytest.mark.parametrize("deep", [False, True])
def test_adapters_move_what_is_predicted(deep):
    """Of the twin that holds them: the network is called where it is registered."""
    from steer.adapters.inject import adapt

    network = nn.Linear(2, 2)
    if deep:
        network = nn.Sequential(nn.Linear(2, 2), nn.SiLU(), nn.Linear(2, 2))

    class Timeless(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network

        def forward(self, x, t):
            return self.inner(x)

    flow, x = OneTime(Timeless(), steer.Linear(), (2,), "x0"), torch.ones(3, 2)
    tuned = adapt(flow)
    before = tuned.lookahead(x, 0.0)
    for p in tuned.adapters().values():
        p.data += 0.1
    assert float((tuned.lookahead(x, 0.0) - before).detach().abs().max()) > 1e-3
    assert torch.equal(tuned.base.lookahead(x, 0.0), flow.lookahead(x, 0.0))


def test_a_straight_velocity_is_exact_from_the_first_step():
    flow = OneTime(lambda x, t: torch.ones_like(x), steer.Linear(), (2,), steps=1)
    assert torch.allclose(flow.lookahead(torch.zeros(1, 2), 0.0), torch.ones(1, 2), atol=1e-6)


def test_velocity_and_score_are_one_prediction():
    student = model(steer.Linear(), "x0", steps=None)
    # a map takes a jump, a lookahead and its gradient a step; here one prediction is both
    assert plan("fmtt", 16)["nfe"] == 16 + 2 * 15 + 1
    assert plan("fmtt", 16, flow=student)["nfe"] == 16 + 15


class TestVelocity(VelocityContract):
    def create_flow(self):
        return model(steer.Linear(), "velocity", steps=32)


class TestNoise(VelocityContract):
    def create_flow(self):
        return model(steer.VariancePreserving(), "eps", steps=32)


class TestStudent(OneJumpContract):
    def create_flow(self):
        return model(steer.Cosine(), "v", steps=None)


class TestDoubles(VelocityContract):
    def create_flow(self):
        return model(steer.Linear(), "x0", steps=32).double()


def test_a_contract_names_the_measured_error():
    class Wrong(OneTime):
        def jump(self, x, s, t):
            return super().jump(x, s, t) + 0.1 * (1 - t)

    class Mine(OneJumpContract):
        def create_flow(self):
            return Wrong(Trained(steer.Linear(), "x0"), steer.Linear(), (2,), "x0", None)

    with pytest.raises(AssertionError, match=r"relative error 0\.\d+, at most 0.0001 expected"):
        Mine().test_jumps_lead_through_the_picture()


@every_path
@every_prediction
@pytest.mark.parametrize("t", [0.05, 0.5, 0.95])
def test_velocity_denoiser_and_score_are_those_of_the_data(path, predicts, t):
    flow, x = model(path, predicts), points(path, t)
    for name in ("velocity", "denoise", "score"):
        found, true = getattr(flow, name)(x, t), getattr(exact(path), name)(x, t)
        assert torch.allclose(found, true, rtol=2e-3, atol=2e-3), name


@every_path
@every_prediction
def test_the_ends_are_finite(path, predicts):
    flow, x = model(path, predicts), points(path, 0.0)
    assert torch.isfinite(flow.lookahead(x, 0.0)).all()
    assert torch.isfinite(flow.velocity(x, 0.0)).all()
    assert torch.equal(flow.denoise(x, 1.0), x)


@every_path
def test_jumps_reach_the_map_to_first_order(path):
    x = points(path, 0.0)
    errors = [
        float(
            (model(path, "x0", steps=n).lookahead(x, 0.0) - exact(path).lookahead(x, 0.0)).norm()
        )
        for n in (32, 64)
    ]
    assert errors[1] < 0.7 * errors[0]
    assert errors[1] < 0.1 * float(x.norm())


def test_a_student_jumps_in_one_call():
    flow, x = model(steer.Linear(), "x0", steps=None, churn=1.0), points(steer.Linear(), 0.3)
    assert (flow.kind, flow.churn) == ("one-jump", 1.0)
    assert torch.allclose(flow.lookahead(x, 0.3), flow.denoise(x, 0.3), atol=1e-6)
    assert torch.equal(flow.jump(x, 0.3, 0.3), x)


@pytest.mark.parametrize("method", list(steer.METHODS))
def test_what_jumps_cost_is_counted(method):
    """A jump of k calls costs k: forecast, counted, and asked of the network are one number."""

    class Rows(Trained):
        rows = 0

        def forward(self, x, t):
            Rows.rows += len(x)
            return super().forward(x, t)

    flow = OneTime(Rows(steer.Linear(), "eps"), steer.Linear(), (2,), "eps", steps=8)
    heat = {"temperature": 0.5} if TABLE[method].tempered else {}
    result = steer.sample(flow, lambda x: x.sum(1), None, 3, 4, method, **heat)
    forward = result.nfe - result.costs["network_gradients"]
    assert forward == pytest.approx(Rows.rows / 3)
    assert result.nfe == pytest.approx(plan(method, 4, flow=flow)["nfe"])
    if method == "none":
        assert result.nfe == 8


def test_a_budget_counts_them_too():
    flow = model(steer.Linear(), "eps", steps=8)
    whole = plan("fmtt", 6, flow=flow)["nfe"]
    result = steer.sample(flow, lambda x: x.sum(1), None, 3, 6, "fmtt", 0.5, budget=0.7 * whole)
    assert result.nfe <= 0.7 * whole


def test_a_models_own_times_and_renoising_are_used():
    class Trailing(OneTime):
        def times(self, steps, start=0.0):
            return [start + (1 - start) * (k / steps) ** 2 for k in range(steps)] + [1.0]

    flow = Trailing(Trained(steer.Linear(), "x0"), steer.Linear(), (2,), "x0", None, churn=1.0)
    seen = [p.time for p in steer.stream(flow, lambda x: x.sum(1), steps=4, method="none")]
    assert seen == pytest.approx([1 / 16, 4 / 16, 9 / 16, 1.0])
    renoised = steer.sample(flow, lambda x: x.sum(1), steps=4, method="none", seed=1)
    still = steer.sample(flow, lambda x: x.sum(1), steps=4, method="none", seed=1, churn=0.0)
    assert not torch.allclose(renoised.x, still.x)
    own = steer.sample(
        flow, lambda x: x.sum(1), method="none", seed=1, times=[0.0, 1 / 16, 4 / 16, 9 / 16, 1.0]
    )
    assert torch.equal(own.x, renoised.x)


def test_renoised_one_jump_samples_keep_the_law():
    """With churn a denoiser's jump is no exact map, but a Gaussian's posterior mean spreads again:
    the mean stays, within four standard errors."""
    flow = model(steer.Linear(), "x0", steps=None, churn=1.0)
    result = steer.sample(flow, lambda x: x.sum(1), particles=4000, steps=8, method="none")
    mean = exact(steer.Linear()).means.mean(0)
    error = result.x.std(0) / 4000**0.5
    assert ((result.x.mean(0) - mean).abs() < 4 * error + 0.05).all()


@pytest.mark.parametrize(
    ("times", "words"),
    [
        ([0.0, 0.5], "this run begins at 0 and ends at 1"),
        ([0.2, 1.0], "times from 0.2 to 1: this run begins at 0"),
        ([0.0, 0.5, 0.5, 1.0], "times must increase"),
        ([0.0, float("nan"), 1.0], "times must increase"),
    ],
)
def test_times_that_are_no_grid(times, words):
    with pytest.raises(ValueError, match=words):
        steer.sample(exact(steer.Linear()), lambda x: x.sum(1), method="none", times=times)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"predicts": "noise"}, "predicts is 'eps', 'x0', 'v' or 'velocity'"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"first": 0.0}, "first must be between 0 and 1"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ValueError, match=words):
        OneTime(lambda x, t: x, steer.Linear(), (2,), **options)
