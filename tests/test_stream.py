"""`steer.stream`: the caller owns the loop, may choose, stop early, and gets the same result."""

import pytest
import torch

import steer
from steer.sampling.forecast import affordable, plan
from steer.sampling.methods import TABLE
from tests.test_flow import mixture

METHODS = list(steer.METHODS)
every_method = pytest.mark.parametrize("method", METHODS)


def reward(x):
    return torch.tanh(x).sum(1)


def request(method, **changes):
    heat = {"temperature": 0.5} if TABLE[method].tempered else {}
    return {"particles": 6, "steps": 4, "method": method, "seed": 2, **heat, **changes}


@every_method
def test_a_stream_collects_what_sample_returns(method):
    flow, prompts = mixture(), ["a", "b"]
    whole = steer.sample(flow, reward, prompts, **request(method))
    populations = steer.stream(flow, reward, prompts, **request(method))
    first = next(populations)
    assert first.log_w.shape == (2, 6)
    assert list(first.positions) == [0, 1]
    last = [first, *populations][-1]
    assert last.time == 1
    assert last.nfe == pytest.approx(whole.nfe)
    result = populations.collect()
    for name in ("x", "rewards", "log_w", "ess"):
        assert torch.equal(getattr(result, name), getattr(whole, name))


@pytest.mark.parametrize("method", ["none", "split", "fmrg-j", "reno"])
def test_a_person_keeps_particles(method):
    """What goes on comes from the chosen ones alone, and there is no evidence any more."""
    flow = steer.GaussianMixture(torch.zeros(1, 2), 1.0)
    populations = steer.stream(flow, reward, **request(method, steps=6))
    chosen = None
    for k, population in enumerate(populations):
        if k == 1:
            chosen = population.x[[1, 4]]
            population.keep([1, 4])
    result = populations.collect()
    assert result.log_z is None
    if method == "none":  # deterministic from there on
        ends = flow.jump(chosen, 2 / 6, 1.0)
        assert torch.allclose(result.x, ends[[0, 1, 0, 1, 0, 1]], atol=1e-4)
    if method in {"fmrg-j", "reno"}:
        assert len(result.x.round(decimals=4).unique(dim=0)) == 2


def test_each_prompt_keeps_its_own():
    flow = steer.GaussianMixture(torch.zeros(1, 2), 1.0)
    populations = steer.stream(flow, reward, ["a", "b"], **request("none", particles=3))
    population = next(populations)
    population.keep([[2], [0]])
    chosen = population.x[[0, 1], [2, 0]]
    ends = flow.jump(chosen, 0.25, 1.0)
    assert torch.allclose(populations.collect().x, ends[:, None].expand(2, 3, 2), atol=1e-4)


@pytest.mark.parametrize("index", [[], [6], [-1], [0.5], [[0], [1]], [True, False] * 3])
def test_what_cannot_be_kept(index):
    population = next(steer.stream(mixture(), reward, **request("none")))
    with pytest.raises(ValueError, match=r"cannot keep .*: give the indices of the particles"):
        population.keep(index)


@every_method
def test_an_early_stop_ends_with_pictures(method):
    populations = steer.stream(mixture(), reward, **request(method, steps=6))
    next(populations).stop()
    result = populations.collect()
    assert torch.allclose(result.rewards, reward(result.x), atol=1e-5)
    assert len(result.trace["reward"]) == 2


def test_a_target_leaves_no_evidence():
    """Whether the run stops depends on the population, so an estimate of Z would be biased."""
    flow, linear = steer.GaussianMixture(torch.zeros(1, 2), 1.0), steer.LinearReward([1.0, 0.3])
    for target in (2.5, 100.0):  # reached, never reached
        result = steer.sample(flow, linear, temperature=0.6, method="split", target=target)
        assert result.log_z is None
    assert steer.sample(flow, linear, temperature=0.6, method="split").log_z is not None


def test_a_budget_keeps_the_evidence_unbiased():
    """Where it stops is known before: E[Z_hat] = Z, within four standard errors of replicates."""
    flow, linear = steer.GaussianMixture(torch.zeros(1, 2), 1.0), steer.LinearReward([1.0, 0.3])
    log_z = flow.tilt(linear, 0.6)[1]
    options = {"temperature": 0.6, "method": "split", "particles": 64, "steps": 10, "moves": 0}
    budget = plan("split", 10, moves=0)["nfe"] // 2
    found = torch.stack(
        [steer.sample(flow, linear, seed=s, budget=budget, **options).log_z for s in range(150)]
    )
    ratio = (found - log_z).exp()
    error = float(ratio.std() / len(ratio) ** 0.5)
    assert error < 0.1
    assert abs(float(ratio.mean()) - 1) < 4 * error


KINDS = [(m, d) for m in METHODS for d in (True, False) if d or not TABLE[m].gradient]


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize(("method", "differentiable"), KINDS)
def test_the_forecast_is_what_is_counted(method, differentiable, steps):
    """Of a mixture, which has closed forms, and for a run of one step as well."""
    flow = mixture()
    asked = steer.reward.wrap(reward, differentiable=differentiable)
    result = steer.sample(flow, asked, **request(method, steps=steps))
    cost = plan(method, steps, differentiable, flow=flow)
    assert result.nfe == cost["nfe"]
    assert result.costs["reward_calls"] == cost["reward_calls"]


@every_method
def test_what_is_affordable_is_spent_and_no_more(method):
    flow = mixture()
    whole = plan(method, 8, flow=flow)["nfe"]
    for budget in (0.4 * whole, 0.8 * whole):
        k = affordable(method, 8, budget, flow=flow)
        spent = steer.sample(flow, reward, budget=budget, **request(method, steps=8)).nfe
        assert k is not None
        assert spent <= budget


def test_populations_are_shaped_as_the_result():
    """A prompt axis for a list; none for one prompt or none."""
    for prompts, lead in ((None, (6,)), ("a", (6,)), (["a"], (1, 6)), (["a", "b"], (2, 6))):
        population = next(steer.stream(mixture(), reward, prompts, 6, 4, "none"))
        assert population.x.shape == (*lead, 3)
        assert population.log_w.shape == population.reward.shape == lead
        assert population.ess.shape == lead[:-1]


def test_who_stops_has_looked():
    flow, linear = steer.GaussianMixture(torch.zeros(1, 2), 1.0), steer.LinearReward([1.0, 0.3])
    populations = steer.stream(flow, linear, ["a", "b"], 4, 6, "split", 0.6, batch_size=4)
    next(populations).stop()  # of the first prompt alone
    log_z = populations.collect().log_z
    assert log_z.isnan().tolist() == [True, False]


def test_a_run_that_failed_has_no_result():
    def spoilt(x):
        seen.append(x)
        return x.sum(1) + (torch.nan if len(seen) > 1 else 0.0)

    seen = []
    populations = steer.stream(
        mixture(), spoilt, ["a", "b"], particles=2, steps=2, method="none", batch_size=2
    )
    with pytest.raises(FloatingPointError):
        list(populations)
    with pytest.raises(RuntimeError, match="ended after 1 of 2 groups"):
        populations.collect()


def test_an_empty_prompt_is_a_prompt_and_a_budget_a_number():
    assert steer.sample(mixture(), reward, "", method="none", steps=1, particles=2).x.shape[0] == 2
    with pytest.raises(ValueError, match="budget must be a number"):
        steer.stream(mixture(), reward, budget=float("nan"))
