"""From how few starts a population descends, and what is said of it, where modes are known."""

import copy
import json

import pytest
import torch

import steer
from steer.sampling.lineage import doubts, lineages
from steer.sampling.methods import TABLE
from tests.test_flow import mixture

P, N = 200, 8


def weigh(log_w, ancestors):
    return float(lineages(torch.tensor([log_w]), torch.tensor([ancestors])))


def test_lineages_are_weights_by_start():
    assert weigh([0.0] * 4, [0, 1, 2, 3]) == pytest.approx(4)
    assert weigh([0.0] * 4, [2, 2, 2, 2]) == pytest.approx(1)
    log = torch.tensor([0.5, 0.25, 0.25]).log().tolist()
    assert weigh(log, [0, 1, 1]) == pytest.approx(2)  # half the weight each
    assert weigh([-1e9, 0.0, 0.0, 0.0], [0, 1, 1, 1]) == pytest.approx(1)


def test_what_is_said_and_of_which_prompt():
    flat, one = torch.zeros(4), torch.tensor([0.0, -20, -20, -20])
    own, all_of_two = torch.arange(4), torch.tensor([2, 2, 2, 2])
    assert doubts(torch.stack([flat]), torch.stack([own])) == []
    (said,) = doubts(torch.stack([flat, one, one]), torch.stack([own] * 3), ["a", "b", "c"])
    assert said.startswith("prompt 'b' and 1 more of 3: nearly all of the weight is on 1.0 of 4")
    (said,) = doubts(torch.stack([flat, flat]), torch.stack([own, all_of_two]), ["a", "b"])
    assert said.startswith("prompt 'b': the remaining particles descend from 1.0 of 4 starts")
    assert "raise the temperature, or use more particles or steps" in said
    assert len(doubts(torch.stack([flat, one]), torch.stack([all_of_two, own]), ["a", "b"])) == 2
    assert doubts(torch.zeros(1, 3), torch.zeros(1, 3, dtype=torch.long)) == []  # of so few


# ------------------------------------------------------------------ the index travels


def test_ancestors_are_where_particles_came_from():
    """Deterministic jumps: a particle is its start, carried on, whatever was resampled between."""
    flow = steer.GaussianMixture(torch.zeros(1, 2), 1.0)
    reward = steer.LinearReward([3.0, 0.0])
    x0 = torch.randn(3, 16, 2, generator=torch.Generator().manual_seed(0))
    guide = steer.Guidance(steer.Lookahead(flow, reward), steer.Jump(flow), threshold=1.0)
    seen = list(guide.steps(x0, seed=1))
    for population in seen:
        starts = x0.gather(1, population.ancestors[..., None].expand(-1, -1, 2))
        carried = flow.jump(starts.flatten(0, 1), 0.0, population.time).reshape(3, 16, 2)
        assert torch.allclose(population.x, carried, atol=1e-4)
    assert all(len(set(row.tolist())) < 16 for row in seen[-1].ancestors)
    assert torch.equal(seen[0].ancestors.sort(1).values[:, 0] >= 0, torch.ones(3).bool())


@pytest.mark.parametrize("method", ["none", "split", "fmrg-j", "reno"])
def test_ancestors_follow_whom_a_person_keeps(method):
    heat = {"temperature": 5.0} if TABLE[method].tempered else {}
    populations = steer.stream(
        mixture(), lambda x: torch.tanh(x).sum(1), particles=6, steps=4, method=method, **heat
    )
    for k, population in enumerate(populations):
        if k == 0:
            assert population.ancestors.tolist() == list(range(6))
            population.keep([4, 1])
    result = populations.collect()
    assert result.ancestors.tolist() == [4, 1, 4, 1, 4, 1]
    assert result.warnings == ()  # a person chose


# ------------------------------------------------------------------ two modes


@pytest.fixture(scope="module")
def two():
    """Two modes of half the mass each; the reward is rough within them, and even between."""
    flow = steer.GaussianMixture(torch.tensor([[-3.0, 0.0], [3.0, 0.0]]), 0.3)
    x0 = torch.randn(P, N, 2, generator=torch.Generator().manual_seed(0))
    found = {}
    for temperature in (0.3, 3.0):
        view = steer.Lookahead(flow, rough, temperature=temperature)
        kernel = steer.Jump(flow, churn=0.3)
        guide = steer.Guidance(view, kernel, scale=1.0, times=[k / 8 for k in range(9)])
        end = guide(x0, seed=1)
        left = (end.log_w.double().softmax(-1) * (end.x[..., 0] < 0)).sum(-1)
        found[temperature] = end, (left < 0.02) | (left > 0.98)
    return found


def rough(x):
    return torch.cos(6 * x[:, 1]) + torch.sin(3 * x[:, 0] * x[:, 1])


def warned(end):
    pairs = zip(end.log_w[:, None], end.ancestors[:, None], strict=True)
    return torch.tensor([bool(doubts(*pair)) for pair in pairs])


def test_a_run_that_lost_a_mode_is_warned_of(two):
    """The ESS shows nothing of it: at a low temperature it is 6 of 8, and one start is left."""
    end, missed = two[0.3]
    said = warned(end)
    assert float(missed.float().mean()) > 0.5
    assert float(end.ess.median()) > N / 2
    assert float(lineages(end.log_w, end.ancestors).median()) < 1.5
    assert float(said[missed].float().mean()) > 0.9  # of those that lost a mode
    assert float(missed[said].float().mean()) > 0.5  # what is said is likely


def test_a_run_that_has_both_modes_is_left_alone(two):
    end, missed = two[3.0]
    said = warned(end)
    assert float(said.float().mean()) < 0.05
    assert float(missed.float().mean()) < 0.05


def test_what_cannot_be_known_is_not_said():
    """The limit: a mode that no start leads to leaves no trace."""
    flow = steer.GaussianMixture(torch.tensor([[-3.0, 0.0], [3.0, 0.0]]), 0.3)
    x0 = torch.randn(N, 2, generator=torch.Generator().manual_seed(0))
    x0[:, 0] = x0[:, 0].abs() + 0.5
    end = steer.Guidance(steer.Lookahead(flow, rough, temperature=5.0), steer.Jump(flow))(x0)
    assert bool((end.x[:, 0] > 0).all())
    assert doubts(end.log_w[None], end.ancestors[None]) == []


# ------------------------------------------------------------------ the result


def test_a_result_says_it_in_print_and_in_its_file(tmp_path):
    flow = steer.load("emoji")

    def bright(images):
        return images.mean((1, 2, 3))

    result = steer.sample(
        flow, bright, ["cat", "owl"], 4, 3, "split", temperature=1e-3, seed=1, moves=0
    )
    (said,) = result.warnings
    assert said.startswith("prompt 'cat' and 1 more of 2: ")
    folder = result.save(tmp_path / "run")
    assert json.loads((folder / "metrics.json").read_text())["warnings"] == [said]
    calm = copy.copy(result)
    calm.log_w, calm.ancestors = 0 * result.log_w, torch.arange(4).expand(2, 4)
    assert calm.warnings == ()
    assert steer.sample(flow, bright, ["cat"], 4, 2, "none").warnings == ()


def test_uneven_weights_on_the_way_lose_nothing_where_they_are_not_resampled():
    """They may even out again, and no particle is a copy of another."""

    def said(threshold):
        result = steer.sample(
            mixture(), lambda x: 40 * x[:, 0], None, 16, 4, "split", temperature=1.0,
            progress=False, threshold=threshold,
        )  # fmt: skip
        assert result.trace["weighed"][:-1].min() < 2
        return [w for w in result.warnings if "collapsed to" in w]

    assert said(0.0) == []
    assert said(0.5)


def test_a_collapse_in_the_last_iteration_of_noise_space_is_said():
    """It is resampled there too, after which all particles are copies."""
    result = steer.sample(
        mixture(), lambda x: 400 * x[:, 0], None, 32, 3, "noise-smc", temperature=1.0,
        progress=False,
    )  # fmt: skip
    assert result.trace["weighed"][-1] < 2 < result.ess
    assert any("at step 3 of 3 the weights collapsed" in w for w in result.warnings)
