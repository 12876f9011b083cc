"""Rewards that are not finite: a run stops, or drops those particles and says so."""

import math

import pytest
import torch

import steer
from steer.sampling.methods import TABLE
from tests.test_oracle import problem

METHODS = list(steer.METHODS)


def half(x):
    """Not a number left of -.5, as a logarithm would be."""
    return x.sum(1) + torch.where(x[:, 0] < -0.5, math.nan, 0.0)


def run(method, reward=half, particles=24, **options):
    heat = {"temperature": 1.0} if TABLE[method].tempered else {}
    return steer.sample(
        problem(2, "linear")[0], reward, ["a", "b"], particles=particles, steps=4, method=method,
        **heat, **options,
    )  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_a_bad_reward_stops_a_run_or_is_dropped(method):
    with pytest.raises(FloatingPointError, match="nan for prompt"):
        run(method)
    done = run(method, on_bad_reward="drop")
    assert done.costs["bad_rewards"] > 0
    assert torch.isfinite(done.rewards.gather(1, done.best[:, None])).all()
    bad = done.rewards == -math.inf
    if TABLE[method].weighted and method not in {"none", "best-of-n"}:
        weights = done.log_w.softmax(1)
        assert (weights[bad] == 0).all()
        assert torch.isfinite(done.log_z).all()
    again = run(method, on_bad_reward="drop")
    assert torch.equal(again.x, done.x)


@pytest.mark.parametrize(
    ("method", "said"),
    [("split", "weight zero"), ("best-of-n", "never the best"), ("fmrg-j", "never the best")],
)
def test_what_became_of_dropped_rewards_is_said_as_the_method_has_it(method, said):
    warnings = " ".join(run(method, on_bad_reward="drop").warnings)
    assert said in warnings
    assert ("tilt" in warnings) == (method == "split")


def test_dropping_is_exact_for_the_tilt_of_what_is_left():
    """A reward of -inf on a half plane: Z is that of the other half."""
    flow, _, _ = problem(2, "linear")
    g = torch.Generator().manual_seed(0)
    x = flow.sample(400_000, g).float()
    exact = half(x).exp().nan_to_num(0).mean().log()
    for method in ("split", "noise-smc"):
        done = steer.sample(
            flow, half, ["a"] * 16, particles=512, steps=8, method=method, temperature=1.0,
            on_bad_reward="drop", seed=3,
        )  # fmt: skip
        z = (done.log_z.double() - exact).exp()
        assert abs(float(z.mean()) - 1) < 4 * float(z.std()) / 4 + 0.02, method
        assert float(z.std()) / 4 < 0.06, method


@pytest.mark.parametrize("method", ["split", "noise-smc", "fk"])
def test_a_prompt_without_any_finite_reward_is_refused(method):
    def nothing(x, prompts):
        bad = torch.tensor([p == "b" for p in prompts])
        return torch.where(bad, math.nan, x.sum(1))

    with pytest.raises(FloatingPointError, match=r"no particle of prompt 1 \('b'\) has a weight"):
        run(method, nothing, on_bad_reward="drop")


def test_another_word_is_refused():
    with pytest.raises(ValueError, match="did you mean drop"):
        run("split", on_bad_reward="dropp")
