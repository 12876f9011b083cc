"""Networks of one time are called once a step: one prediction gives lookahead and jump."""

import pytest
import torch

import steer
from steer.flow import FlowMap
from steer.guidance.potential import Denoised, Lookahead
from steer.guidance.state import State
from steer.models.second_timed import fresh_second_time
from steer.sampling.counts import Counted, Counts
from steer.sampling.forecast import plan
from tests.tiny_flows import CASES, FAMILIES, PROMPT, flow, pipe, seen_as

TIMES = [(0.0, 0.3), (0.3, 0.3), (0.3, 0.45), (0.5, 0.95), (0.9, 1.0)]
METHODS = {
    "fk": {"temperature": 0.1}, "fmrg-j": {}, "dps": {}, "das": {"temperature": 0.1},
    "fmtt": {"temperature": 0.1}, "denoiser": {"temperature": 0.1}, "tds": {"temperature": 0.1},
    "renoise": {"temperature": 0.1}, "svdd": {"temperature": 0.1}, "mpgd": {},
}  # fmt: skip
MIXTURE = steer.GaussianMixture([[-1.0, 0.5], [1.0, -0.5]], 0.3)


def red(images):
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


def points(one, n=2):
    return torch.randn(n, *one.event_shape, generator=torch.Generator().manual_seed(2))


def one_time(path, predicts="velocity", steps=None):
    m = steer.GaussianMixture([[-1.0, 0.5], [1.0, -0.5]], 0.3, path=path)

    def network(x, t):
        b = m.velocity(x.double(), t.double())
        d, (alpha, beta) = m.path.denoised(x.double(), b, t.double()), m.path(t.double())
        eps = (x - beta[:, None] * d) / alpha[:, None]
        v = alpha[:, None] * d - beta[:, None] * eps  # as `OneTime` reads it, up to its sign
        return {"velocity": b, "x0": d, "eps": eps, "v": -v}[predicts].to(x)

    return steer.OneTime(network, path, (2,), predicts, steps)


def agrees(one, x, s, t):
    """A flow that says so does step on from one prediction, and has the velocity of it."""
    if not one.reuses(s, t):
        return False
    d, y = one.denoise(x, s), one.jump(x, s, t)
    torch.testing.assert_close(one.path.carried(x, d, s, t), y, rtol=1e-4, atol=2e-5)
    if s < 1:
        torch.testing.assert_close(
            one.path.velocity_of(x, d, s), one.velocity(x, s), rtol=1e-4, atol=1e-4
        )
    if one.reuses(s, 1.0):
        torch.testing.assert_close(one.jump(x, s, 1.0), d, rtol=1e-4, atol=2e-5)
    return True


@pytest.mark.parametrize(("name", "on"), CASES)
def test_what_a_pipeline_reuses_is_its_own_jump(name, on):
    one = flow(name, on=on).given([PROMPT])
    with torch.no_grad():
        found = [agrees(one, points(one), s, t) for s, t in TIMES]
    if one.kind == "two-time":
        assert not any(found)
    else:
        assert all(found[1:])


@pytest.mark.parametrize("predicts", ["velocity", "x0", "eps"])
@pytest.mark.parametrize("path", [steer.Linear(), steer.Cosine(), steer.VariancePreserving()])
def test_what_a_network_of_one_time_reuses_is_its_own_jump(path, predicts):
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    one = one_time(path, predicts)
    assert all(agrees(one, x, s, t) for s, t in TIMES[1:])
    many = one_time(path, predicts, 16)
    assert [many.reuses(s, t) for s, t in TIMES] == [False, True, False, False, False]
    assert agrees(many, x, 0.5, 0.55)


def test_a_map_reuses_nothing():
    assert not MIXTURE.reuses(0.3, 0.4)
    assert not steer.load("emoji").reuses(0.3, 0.4)


def test_a_state_steps_on_from_what_was_evaluated():
    one = one_time(steer.Linear())
    counts = Counts()
    seen = Counted(one, counts)
    x = points(one, 3)
    for kind, known in ((Lookahead, True), (Denoised, True)):
        here = State(x, 0.4, seen, kind(seen, lambda images: images.sum(1)))
        assert here.potential.predicts(seen, 0.4) == known
        here.evaluation(derivatives=True)
        before = counts.forward
        y, v = here.jump(0.6), here.velocity
        assert here.jump(0.6) is y
        assert counts.forward == before
        torch.testing.assert_close(y, one.jump(x, 0.4, 0.6))
        torch.testing.assert_close(v, one.velocity(x, 0.4))
        chosen = here.rows(torch.tensor([2, 0]))
        torch.testing.assert_close(chosen.jump(0.6), y[[2, 0]])
        assert counts.forward == before
    far = Lookahead(seen, lambda images: images.sum(1), steps=2)
    here = State(x, 0.4, seen, far)
    here.evaluation()
    before = counts.forward
    here.jump(0.6)
    assert counts.forward == before + 3  # a lookahead of two jumps is no prediction


class Clamped(Lookahead):
    """A view of a person's own."""

    def _score(self, x, t):
        scores, images, clean = super()._score(x, t)
        return scores, images, clean.clamp(-0.5, 0.5)


@pytest.mark.parametrize("kind", [Lookahead, Denoised, Clamped])
def test_the_prediction_of_another_flow_moves_nothing(kind):
    """The reward may be viewed through another model than the one that is sampled."""
    counts = Counts()
    one, other = Counted(one_time(steer.Linear()), counts), one_time(steer.Linear())
    x = points(one, 3)
    here = State(x, 0.4, one, kind(one if kind is Clamped else other, lambda im: im.sum(1)))
    assert here.evaluation(derivatives=True).clean is not None
    before = counts.forward
    y, v = here.jump(0.6), here.velocity
    assert counts.forward == before + 2 * 3
    torch.testing.assert_close(y, one.jump(x, 0.4, 0.6))
    torch.testing.assert_close(v, one.velocity(x, 0.4))


def test_the_flow_that_is_sampled_is_the_kernels():
    """Without a reward, its law: that of a mixture at ±3, looked at through one at ±1."""

    def model(mode):
        mixture = steer.GaussianMixture([[-mode, 0.5], [mode, -0.5]], 0.3)
        return steer.OneTime(
            lambda x, t: mixture.velocity(x.double(), t.double()).to(x), steer.Linear(), (2,)
        )

    seen, sampled = model(1.0), model(3.0)
    x = torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
    potential = Lookahead(seen, lambda images: 0 * images.sum(1))
    guide = steer.Guidance(potential, steer.Jump(sampled), times=[i / 8 for i in range(9)])
    assert float(guide(x, seed=0).x[:, 0].abs().mean()) > 2


def test_a_consistency_models_first_training_steps_are_its_own():
    """Near the data its jump is not made of its denoiser alone."""
    one = flow("sd15_lcm").given([PROMPT])
    x, kept = torch.randn(2, *one.event_shape), 0
    with torch.no_grad():
        for s in (0.3, 0.6, 0.9, 0.95, 0.97, 0.98):
            if one.reuses(s, 0.99):
                kept += 1
                d = one.jump(x, s, 1.0)
                torch.testing.assert_close(one.denoise(x, s), d, rtol=1e-3, atol=1e-3)
                torch.testing.assert_close(
                    one.path.velocity_of(x, d, s), one.velocity(x, s), rtol=1e-3, atol=1e-2
                )
    assert kept
    assert not one.reuses(0.97, 0.99)


def test_a_denoiser_that_is_told_the_end_reuses_nothing_whatever_it_is_called():
    base = flow("sd3")
    one = seen_as(pipe("sd3"), "sd3", second_time=fresh_second_time(base), kind="velocity")
    assert one.kind == "velocity"
    assert not one.reuses(0.3, 0.6)


def test_a_budget_is_kept_where_the_schedule_decides_what_is_reused():
    one = flow("sd15_flow")
    for budget in (6, 8):
        found = steer.sample(
            one, red, [PROMPT], particles=1, steps=4, seed=0, method="fmrg-j", budget=budget
        )
        assert found.nfe <= budget
    planned = plan("fmrg-j", 4, flow=one.given([PROMPT]))["nfe"]
    assert planned == steer.sample(one, red, [PROMPT], 1, 4, method="fmrg-j").nfe


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["flux", "sdxl"])
def test_a_run_is_that_of_two_calls_a_step(name, method, monkeypatch):
    one, options = flow(name), METHODS[method]
    run = {
        "prompts": [PROMPT], "particles": 2, "steps": 3, "seed": 0, "method": method, **options
    }  # fmt: skip
    once = steer.sample(one, red, **run)
    own = {k: v for k, v in options.items() if k != "temperature"}
    assert once.nfe == plan(method, 3, flow=one.given([PROMPT]), **own)["nfe"]
    for kind in {c for c in type(one).__mro__ if "reuses" in vars(c) and c is not FlowMap}:
        monkeypatch.setattr(kind, "reuses", lambda self, s, t: False)
    twice = steer.sample(one, red, **run)
    assert once.nfe < twice.nfe
    torch.testing.assert_close(once.x, twice.x, rtol=1e-3, atol=1e-3)


def test_gradient_free_steering_costs_what_no_steering_does():
    for name in FAMILIES:
        one = flow(name).given([PROMPT])
        if one.kind == "velocity":
            assert plan("fk", 8, flow=one)["nfe"] == plan("none", 8, flow=one)["nfe"], name
            # noise alone is another state than the schedule's first one
            first = int(not one.along(one.times(8)).reuses(0.0, 0.5))
            assert plan("fmrg-j", 8, flow=one)["nfe"] == 16 + first, name
