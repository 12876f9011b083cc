"""The caller's state of torch changes no number: tuning, parts of one's own, checks, compare."""

import contextlib
import functools
import json

import pytest
import torch
from torch import nn

import steer
from recipes.compare import compare
from rewards.checking.run import check
from rewards.combine.normalised import Normalised
from steer.models.two_time import NetworkFlow
from steer.objectives.table import TABLE
from steer.reward import Reward, learners
from steer.testing import Corrected
from steer.tuning.instruments import Instruments
from tests.test_bind_once import network
from tests.test_door import STATES, Ambient

QUICK = {
    "rank": 2, "batch_size": 8, "warm": 1, "check_every": 0, "progress": False,
    "precision": "32-true", "accelerator": "cpu", "temperature": 0.5, "steps": 2,
}  # fmt: skip


@contextlib.contextmanager
def everything():
    """All of them at once."""
    with contextlib.ExitStack() as stack:
        for state in ("no_grad", "autocast", "default_dtype", "inference"):
            stack.enter_context(getattr(Ambient, state)())
        yield


class Restless(Reward):
    """A reward that is left in training mode, with all that must not move."""

    def __init__(self, d=2):
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(d), nn.Dropout(0.5)
        self.weight = nn.Parameter(torch.linspace(1, -1, d))
        self.train()

    def forward(self, images, prompts=None, metadata=None):
        return torch.tanh(self.drop(self.norm(images.flatten(1))) @ self.weight)


def toy():
    return Corrected(steer.GaussianMixture(torch.zeros(1, 2), 0.5), width=8)


def tuned(objective, flow=None, reward=None):
    torch.manual_seed(0)
    flow, reward = toy() if flow is None else flow, Restless() if reward is None else reward
    made = steer.finetune(flow, reward, objective=objective, **QUICK)
    return {name: p.detach().clone() for name, p in made.adapters().items()}


@functools.cache
def plain(objective):
    return tuned(objective)


def same(found, known):
    return all(found[k].dtype == p.dtype and torch.equal(found[k], p) for k, p in known.items())


@pytest.mark.parametrize("objective", TABLE)
def test_tuning_is_the_plain_run(objective):
    flow, reward = toy(), Restless()
    with everything():
        found = tuned(objective, flow.train(), reward)
        assert torch.get_default_dtype() == torch.float64
        assert torch.is_inference_mode_enabled()
    assert same(found, plain(objective))


@pytest.mark.parametrize("state", STATES)
def test_tuning_in_each_state(state):
    flow, reward = toy(), Restless()
    with getattr(Ambient, state)():
        found = tuned("direct", flow, reward)
    assert same(found, plain("direct"))


@pytest.mark.parametrize("objective", ["direct", "nft"])
def test_tuning_leaves_rewards_as_they_were(objective):
    """No gradient on their weights, no statistics moved, their modes restored; judges too."""
    flow, rewards = toy(), [Restless() for _ in range(3)]
    rewards[0].drop.eval()
    flow.network[0].train()
    before = [{k: v.clone() for k, v in r.state_dict().items()} for r in rewards]
    steer.finetune(
        flow, rewards[0], objective=objective, judge=rewards[1], held_out={"other": rewards[2]},
        **QUICK,
    )  # fmt: skip
    for reward, state in zip(rewards, before, strict=True):
        assert all(torch.equal(v, state[k]) for k, v in reward.state_dict().items())
        assert reward.weight.grad is None
        assert reward.weight.requires_grad
        assert reward.training
        assert reward.norm.training
    assert not rewards[0].drop.training
    assert rewards[1].drop.training
    assert flow.network[0].training


def test_tuning_lets_scales_learn_and_then_stand():
    inner = Restless()
    reward = Normalised(inner)
    steer.finetune(toy(), reward, objective="nft", **QUICK)
    (scale,) = learners(reward)
    assert float(scale.statistics[0]) == 3  # one-jump samples, then an update a step
    assert not scale.training
    assert inner.training
    assert int(inner.norm.num_batches_tracked) == 0


# ------------------------------------------------------------------ parts of one's own


def guided(d=2):
    flow, reward = toy(), Restless(d)
    view = steer.Lookahead(flow, reward, temperature=0.5)
    return {
        "fmtt": steer.Guidance(view, steer.Sde(flow), steer.Continuous(), scale=1.0),
        "split": steer.Guidance(view, steer.Langevin(flow)),
        "wrapped": steer.Guidance(steer.Clipped(view, 1.0), steer.Jump(flow, 0.5), scale=1.0),
        "control": steer.FlowMapControl(flow, view, [0, 0.5, 1]),
        "ascent": steer.NoiseAscent(flow, view, 3),
    }


@functools.cache
def plain_steps(name):
    return steps(guided()[name], start())


def steps(sampler, x0):
    return [p.x.clone() for p in sampler.steps(x0, seed=3)]


def start():
    return torch.randn(6, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float32)


@pytest.mark.parametrize("name", ["fmtt", "split", "wrapped", "control", "ascent"])
def test_steps_of_parts_are_the_plain_ones(name):
    sampler, known = guided()[name], plain_steps(name)
    with everything():
        found = steps(sampler, start())
    for a, b in zip(found, known, strict=True):
        assert torch.equal(a, b)


# ------------------------------------------------------------------ instruments, checks, compare


def pictures(seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(8, 3, 8, 8, generator=g, dtype=torch.float32)


def read(reward):
    looked = Instruments(
        pictures(), ["a", "b"], reward, judge=lambda x: x.mean((1, 2, 3)),
        held_out={"other": reward},
    )  # fmt: skip
    return looked.read(pictures(1)).as_dict()


def test_instruments_read_the_same():
    reward = Restless(192)
    known = read(reward)
    with everything():
        found = read(reward)
    assert found == pytest.approx(known, rel=1e-12)


def report():
    found = check(lambda x: torch.tanh(x[:, 0] - x[:, 1]).mean((1, 2)), size=16)
    return {f.name: f.verdict for f in found.findings if f.name not in {"speed", "memory"}}


@pytest.mark.filterwarnings("ignore")
def test_a_reward_is_checked_the_same():
    known = report()
    assert known["finite difference"] == "pass"
    with everything():
        assert report() == known


TOY = """
from tests.test_bind_once import NetworkFlow, network

def Net():
    return NetworkFlow(network()).train()

def redness(images):
    return images[:, 0].mean((1, 2))
"""


def test_a_comparison_is_the_plain_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy.py").write_text(TOY)

    def figures(out):
        compare(
            "toy.py:Net", reward="toy.py:redness", judge="toy.py:redness", prompts=["cat", "owl"],
            methods=["none:steps=2,particles=2", "fmrg-j:steps=2,particles=2"], seeds=1, out=out,
        )  # fmt: skip
        made = json.loads((out / "figures.json").read_text())["methods"]
        return [{k: v for k, v in row.items() if k != "seconds"} for row in made.values()]

    known = figures(tmp_path / "plain")
    with everything():
        assert figures(tmp_path / "odd") == known


def test_a_flow_made_in_each_state_draws_the_same():
    """A start that was drawn in inference mode can be guided, too."""
    flow = NetworkFlow(network())
    with torch.inference_mode():
        x0 = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    potential = steer.Lookahead(flow, lambda x: x.mean((1, 2, 3)))
    guide = steer.Guidance(potential, steer.Sde(flow), scale=1.0, times=[0, 0.5, 1])
    assert torch.equal(guide(x0).x, guide(x0.clone()).x)


# ------------------------------------------------------------------ weights of inference mode


class Linear(Reward):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(1, -1, 2))

    def forward(self, images, prompts=None, metadata=None):
        return torch.tanh(images) @ self.weight


def of_inference(make):
    with torch.inference_mode():
        return make()


def test_weights_of_inference_mode_are_named_where_a_gradient_must_pass():
    model, reward = of_inference(toy), of_inference(Linear)
    few = {"particles": 2, "steps": 2, "seed": 0}
    words = r"a gradient must pass the {}, and \d+ of its weights were made inside "
    words += r"torch\.inference_mode\(\), {}.* the first of them: make or load it outside"
    for method in ("fmtt", "split", "fmrg-j", "reno"):
        with pytest.raises(ValueError, match=words.format("model", "net")):
            steer.sample(model, Linear(), method=method, **few)
        with pytest.raises(ValueError, match=words.format("reward", "weight")):
            steer.sample(toy(), reward, method=method, **few)
    with pytest.raises(ValueError, match=words.format("model", "net")):
        steer.finetune(model, Linear(), **QUICK)
    with pytest.raises(ValueError, match=words.format("reward", "weight")):
        steer.finetune(toy(), reward, **QUICK)
    for method in ("none", "best-of-n"):  # no gradient is asked
        assert steer.sample(model, reward, method=method, **few).rewards.isfinite().all()
    values = steer.reward.wrap(reward, differentiable=False)
    assert steer.sample(model, values, method="split", **few).rewards.isfinite().all()
