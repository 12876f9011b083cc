"""The comparison: equal calls, whole or absent, the same after an interruption."""

import contextlib
import io
import json
import shutil
from contextlib import redirect_stderr, redirect_stdout

import pytest
import torch
import yaml
from safetensors.torch import load_file

import rewards
import steer
from recipes import methods
from recipes.cli import main
from recipes.compare_report import kind
from recipes.defaults import own
from recipes.entries import Entry, entry, equal_calls
from recipes.figures import estimate
from recipes.inputs import load_model, read_prompts
from steer.adapters.inject import adapt
from steer.adapters.store import save_adapters
from steer.sampling.forecast import plan
from steer.sampling.request import PROBES

FLOW = '''
import copy, torch, steer

class Pixels(steer.FlowMap):
    """A mixture of flat colours on 3x4x4 pixels."""

    def __init__(self):
        super().__init__()
        c = torch.tensor([[1.0, 0.2, 0.2], [0.2, 1.0, 0.2], [0.2, 0.2, 1.0]])
        means = c[:, :, None].expand(3, 3, 16).reshape(3, 48)
        self.mixture = steer.GaussianMixture(means, 0.3)
        self.path, self.event_shape = self.mixture.path, (3, 4, 4)

    def velocity(self, x, t):
        return self.mixture.velocity(x.flatten(1), t).reshape(x.shape)

    def jump(self, x, s, t):
        return self.mixture.jump(x.flatten(1), s, t).reshape(x.shape)

class Net(Pixels):
    """The same with a layer, to put adapters on."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Conv2d(3, 3, 1)
        torch.nn.init.zeros_(self.layer.weight), torch.nn.init.zeros_(self.layer.bias)

    def jump(self, x, s, t):
        return super().jump(x, s, t) + (t - s) * self.layer(x)

class Told(Net):
    """The same, told by prompts."""

    def given(self, prompts):
        bound = copy.copy(self)
        bound._modules = dict(self._modules)
        return bound

mixture = steer.GaussianMixture(torch.tensor([[-1.0, 0.0], [1.0, 0.5]]), 0.4)

class Twice(steer.FlowMap):
    """The mixture, whose every call takes two evaluations, and its jumps three."""

    def __init__(self):
        super().__init__()
        self.path, self.event_shape = mixture.path, (2,)

    def velocity(self, x, t):
        return mixture.velocity(x, t)

    def jump(self, x, s, t):
        return mixture.jump(x, s, t)

    def calls(self, name, *times):
        return 3 if name == "jump" else 2

class Stirred(steer.Kernel):
    """Jumps that re-noise."""

    def __init__(self, flow, churn=0.5):
        self.flow, self.churn = flow, churn

    def propose(self, x, s, t, potential, scale, noise):
        return steer.Jump(self.flow, self.churn).propose(x, s, t, potential, scale, noise)

class Needy(Stirred):
    def __init__(self, flow, churn):
        super().__init__(flow, churn)

def climb(flow, reward, prompts, temperature, times, *, scale=0.2):
    """Control, as a builder of one's own."""
    view = steer.Lookahead(flow, reward, prompts, ramp=torch.ones_like)
    return steer.FlowMapControl(flow, view, times, scale)

climb.tempered, climb.gradient = False, True

def first(x):
    return x[:, 0]

linear = steer.LinearReward(torch.tensor([1.0, 0.0]))

def redness(images):
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))
'''
METHODS = ["none:steps=2,particles=2", "best-of-n:steps=2", "split:steps=2,particles=2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("compare")
    (path / "toy.py").write_text(FLOW)
    return path


@pytest.fixture
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)
    for name in folders(folder):
        if name != "whole":
            shutil.rmtree(folder / name)
    return folder


@pytest.fixture(scope="module")
def whole(folder):
    """A comparison in one go: its folder, and what it printed."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(folder), redirect_stdout(out), redirect_stderr(err):
        assert run(out="whole") == 0
    return folder / "whole", out.getvalue(), err.getvalue()


def run(*words, **options):
    settings = {
        "model": "toy.py:Pixels", "reward": "toy.py:redness", "seeds": 2, "out": "run",
        "judge": "embedded",
        "prompts": '["fox", "animal"]', "methods": json.dumps(METHODS), **options,
    }  # fmt: skip
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in settings.items() if v is not None]
    return main(["compare", *words, *flags])


def refused(capsys, *parts):
    err = capsys.readouterr().err
    for part in parts:
        assert part in err, err
    assert "Traceback" not in err


def folders(here):
    return sorted(p.name for p in here.iterdir() if p.name not in {"toy.py", "__pycache__"})


def test_an_entry_is_read():
    assert entry("none") == Entry("none", 4, 4)
    assert entry("best-of-n").particles is None
    one = entry("split:steps=8, strength=1e1,threshold=[0.2, 0.5]")
    assert (one.steps, one.particles) == (8, 4)
    assert one.options == {"strength": 10.0, "threshold": [0.2, 0.5]}


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("fmt", ["unknown method 'fmt'", "did you mean fmtt"]),
        ("fmtt:strenth=2", ["'fmtt'", "'strenth'", "did you mean strength"]),
        ("none:strength=2", ["'none'", "'strength'", "Known: churn, keep, particles, steps"]),
        ("fmtt:steps", ["method:key=value"]),
        ("fmtt:steps=,scale=1", ["steps=..."]),
        ("fmtt:steps=many", ["is not a number"]),
        ("fmtt:steps=2.5", ["whole number"]),
        ("fmtt:steps=]", ["method:key=value"]),
        ("fmtt:steps=0", ["steps must be at least 1"]),
        ("best-of-n", ["add a guided method"]),
        ("best-of-n:keep=all", ["'keep'", "other than best-of-n"]),
        ("fmtt:keep=some", ["'keep'", "best, or all"]),
    ],
)
def test_a_wrong_entry_is_refused_before_any_work(text, parts, here, capsys):
    assert run(methods=json.dumps([text])) == 2
    refused(capsys, *parts)
    assert not {*folders(here)} & {"run", ".run.partial"}


def test_best_of_n_has_the_calls_of_the_method_beside_it():
    texts = ["none", "best-of-n:steps=4", "split", "fmtt:temperature=1", "best-of-n:particles=9"]
    rows = equal_calls([entry(t) for t in texts], True)
    split, fmtt = plan("split", 16)["nfe"] * 4 + PROBES, plan("fmtt", 16)["nfe"] * 4
    assert [(r.method, r.particles) for r in rows] == [
        ("none", 4), ("split", 4), ("best-of-n", split // 4), ("fmtt", 4),
        ("best-of-n", fmtt // 4), ("best-of-n", 9),
    ]  # fmt: skip
    for row, beside in ((1, 2), (3, 4)):
        assert 0 <= rows[row].calls(True) - rows[beside].calls(True) < 4


def test_methods_of_the_same_cost_share_a_row():
    texts = "best-of-n", "fmtt", "fmtt:strength=5"
    rows = equal_calls([entry(t) for t in texts], True)
    assert [r.method for r in rows] == ["fmtt", "best-of-n", "fmtt"]
    with pytest.raises(ValueError, match="given twice"):
        equal_calls([entry("fmtt"), entry("fmtt:steps=16")], True)


def test_the_packaged_prompts_are_half_specific():
    prompts = read_prompts(own("emoji").compared).prompts
    assert [kind(p) for p in prompts] == ["specific"] * 25 + ["broad"] * 25
    assert len(set(prompts)) == 50
    flow = steer.load("emoji")
    assert all(flow.given([p]) for p in prompts)


def test_the_folder_is_complete_and_its_numbers_agree(here, whole, capsys):
    out, printed, told = whole
    assert "network calls" in told
    assert {p.name for p in out.iterdir()} == {
        "table.md", "figures.json", "sheet.png", "pictures.safetensors", "config.yaml",
        *(f"{n}.{kind}" for n in ("reward_nfe", "reward_diversity", "judge_reward")
          for kind in ("png", "svg")),
    }  # fmt: skip
    assert folders(here) == ["whole"]
    table = (out / "table.md").read_text()
    assert table in printed
    figures = json.loads((out / "figures.json").read_text())
    assert [p["kind"] for p in figures["prompts"]] == ["specific", "broad"]
    total = 2 * plan("split", 2)["nfe"] + PROBES
    names = ["none, 2 steps", "split, 2 steps, 2 particles", f"best of {total // 2}, 2 steps"]
    assert list(figures["methods"]) == names
    assert [m["nfe"] for m in figures["methods"].values()] == [2, total, total // 2 * 2]
    for name, method in figures["methods"].items():
        reward = torch.tensor(method["reward"])
        assert reward.shape == (2, 2)
        for i, part in enumerate(("specific", "broad")):
            summary = method["summary"][part]
            assert summary["reward"]["mean"] == pytest.approx(float(reward[i].mean()))
            assert f"{summary['judge']['mean']:.4f}" in table
            assert summary["diversity"]["mean"] == pytest.approx(method["diversity"][i])
        assert method["top1"][1] == [None, None]  # no label
        base = torch.tensor(figures["methods"][names[0]]["reward"])
        if name != names[0]:
            paired = estimate((reward - base).mean(1))
            assert method["summary"]["all"]["reward - none"]["mean"] == pytest.approx(paired.mean)
            assert method["summary"]["all"]["reward - none"]["error"] == pytest.approx(
                paired.error
            )
    many = torch.tensor(figures["methods"][names[2]]["reward"])
    assert (many > base).all()
    pictures = load_file(out / "pictures.safetensors")
    assert [tuple(pictures[n].shape) for n in names] == [(2, 2, k, 3, 4, 4) for k in (2, 1, 1)]
    assert yaml.safe_load((out / "config.yaml").read_text())["methods"] == METHODS
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    assert run(out="whole") == 0
    assert "is finished" in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert run(out="whole", seeds=3) == 2
    refused(capsys, "exists already")
    (out / "config.yaml").write_text("methods: []\n")
    assert run(out="whole") == 2
    refused(capsys, "exists already")


def test_adapters_are_compared_at_their_scale(here, capsys):
    tuned = adapt(load_model("toy.py:Net"), rank=1)
    for p in tuned.adapters().values():
        p.data += 0.5
        p.data[0] *= 2
    save_adapters(tuned, "lora")
    settings = {"model": "toy.py:Net", "methods": '["none:steps=1,particles=2"]', "seeds": 1}
    assert run(**settings, lora="lora", lora_scale=0.5) == 0
    (row,) = json.loads((here / "run/figures.json").read_text())["methods"].values()
    expected = steer.sample(
        tuned.at(0.5), rewards.load("toy.py:redness"), ["fox", "animal"], 2, 1, "none", seed=0
    )
    assert torch.tensor(row["reward"])[:, 0].tolist() == pytest.approx(
        expected.rewards.mean(1).tolist(), abs=1e-5
    )
    config = yaml.safe_load((here / "run/config.yaml").read_text())
    assert (config["lora"], config["lora_scale"]) == ("lora", 0.5)
    capsys.readouterr()
    assert run(**settings, lora_scale=0.5, out="other") == 2
    refused(capsys, "lora_scale needs adapters")


def test_a_model_of_one_s_own_is_compared_by_its_reward_alone(here, tmp_path, capsys):
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "a"}\n{"text": "b", "reward_prompt": "c"}\n')
    settings = {"methods": '["none:steps=1,particles=2"]', "seeds": 1, "judge": None}
    assert run(**settings, prompts=None, prompts_file=file) == 0
    assert "model toy.py:Pixels has no default judge" in capsys.readouterr().err
    figures = json.loads((here / "run/figures.json").read_text())
    assert figures["prompts"] == [{"prompt": p, "kind": "all"} for p in "ab"]
    (row,) = figures["methods"].values()
    assert {*row["summary"]["all"]} == {"reward", "diversity", "reward - none", "nfe"}
    assert row["diversity"][0] > 0
    assert not {"judge", "top1"} & {*row}
    assert not (here / "run/judge_reward.png").exists()
    assert (here / "run/reward_nfe.png").exists()
    assert "## all prompts (2 x 1 seeds)" in (here / "run/table.md").read_text()
    for missing, message in [
        (
            {"prompts": None, "model": "toy.py:Told"},
            "'toy.py:Told' has no default prompts: give --prompts",
        ),
        ({"reward": None}, "'toy.py:Pixels' has no default reward: give --reward"),
    ]:
        assert run(**{**settings, "out": "other", **missing}) == 2
        refused(capsys, message)


def test_an_interrupted_comparison_goes_on_and_gives_the_same(here, whole, monkeypatch, capsys):
    real, calls = steer.sample, []

    def sample(*args, **kwargs):
        calls.append(kwargs)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(steer, "sample", sample)
        assert run() == 130
        assert folders(here) == [".run.partial", "whole"]
        assert run(seeds=1) == 2
        refused(capsys, "other settings", "--overwrite")
        before = len(calls)
        assert run() == 0
        assert len(calls) - before == 2 * 3 - 3  # seeds x rows, and the finished ones
    assert folders(here) == ["run", "whole"]
    assert (here / "run" / "table.md").read_text() == (here / "whole" / "table.md").read_text()
    a, b = (load_file(here / d / "pictures.safetensors") for d in ("run", "whole"))
    assert all(torch.equal(a[name], b[name]) for name in b)


# ------------------------------------------------------------------ vectors, own methods

VECTORS = {
    "model": "toy.py:mixture", "reward": "toy.py:first", "judge": None, "prompts": None,
    "seeds": 2,
}  # fmt: skip
OWN = [
    "none:steps=2,particles=64", "best-of-n:steps=2",
    "toy.py:Stirred:steps=4,particles=8,temperature=1,churn=0.75,scale=1.5",
    "toy.py:climb:steps=2,particles=2",
]  # fmt: skip


def test_a_mixture_is_compared_by_kernel_and_sampler_of_one_s_own(here, capsys):
    assert run(**VECTORS, methods=json.dumps(OWN)) == 0
    assert {p.name for p in (here / "run").iterdir()} == {
        "table.md", "figures.json", "reward_nfe.png", "reward_diversity.png", "reward_nfe.svg",
        "reward_diversity.svg", "samples.safetensors", "config.yaml",
    }  # fmt: skip
    figures = json.loads((here / "run/figures.json").read_text())
    assert figures["prompts"] == [{"prompt": "", "kind": "all"}]
    rows = figures["methods"]
    stirred = "Stirred, 4 steps, 8 particles, temperature 1, churn 0.75, scale 1.5"
    climb = "climb, 2 steps, 2 particles"
    assert list(rows) == [
        "none, 2 steps", stirred, f"best of {int(rows[stirred]['nfe']) // 2}, 2 steps",
        climb, f"best of {int(rows[climb]['nfe']) // 2}, 2 steps",
    ]  # fmt: skip
    samples = load_file(here / "run/samples.safetensors")
    assert samples["none, 2 steps"].shape == (1, 2, 64, 2)
    for label, row in rows.items():
        scores = samples[label][..., 0].mean(-1)
        assert torch.allclose(torch.tensor(row["reward"]), scores, atol=1e-5)
    plain = samples["none, 2 steps"].flatten(0, 2)
    assert rows["none, 2 steps"]["diversity"] == pytest.approx(
        [float(torch.pdist(plain).mean())], rel=1e-4
    )
    assert rows[stirred]["summary"]["all"]["reward - none"]["mean"] > 0.5


@pytest.mark.parametrize("reward", ["first", "linear"])
def test_the_exact_tilt_of_a_mixture_stands_beside_the_methods(here, reward):
    """By importance resampling for a black box, in closed form for a linear reward: the same."""
    texts = ["none:steps=2", "renoise:steps=4,particles=64,temperature=0.5,keep=all"]
    settings = {**VECTORS, "reward": f"toy.py:{reward}", "judge": "toy.py:first"}
    assert run(**settings, methods=json.dumps(texts)) == 0
    p = steer.GaussianMixture(torch.tensor([[-1.0, 0.0], [1.0, 0.5]]), 0.4)
    figures = json.loads((here / "run/figures.json").read_text())
    base, *tilts = figures["exact_tilts"]
    assert (base["temperature"], base["strength"], base["kl"]) == (None, 0, 0)
    temperatures = [row["temperature"] for row in tilts]
    assert temperatures == sorted(temperatures, reverse=True)
    assert 0.5 in temperatures
    assert len(tilts) == 7 + (reward == "linear")  # the lowest leaves too few samples
    deviation = tilts[0]["strength"] * tilts[0]["temperature"]
    assert deviation == pytest.approx((1 + 0.4) ** 0.5, rel=0.02)
    for row in tilts:
        q, log_z = p.tilt(steer.LinearReward(torch.tensor([1.0, 0.0])), row["temperature"])
        mean = float(q.weights @ q.means[:, 0])
        assert abs(row["reward"]["mean"] - mean) < 5 * row["reward"]["error"] < 0.2
        assert row["judge"] == row["reward"]
        assert row["kl"] == pytest.approx(mean / row["temperature"] - float(log_z), abs=0.15)
        assert (row["ess"] == 2**15) == (reward == "linear")
    assert "## The exact tilt" in (here / "run/table.md").read_text()
    ((label, row),) = (r for r in figures["methods"].items() if "all kept" in r[0])
    assert torch.tensor(row["reward"]).shape == (1, 2)
    assert len(load_file(here / "run/samples.safetensors")[label][0, 0]) == 64
    exact = next(t for t in tilts if t["temperature"] == 0.5)["reward"]["mean"]
    found = row["summary"]["all"]["reward"]
    assert found["error"] < 0.2  # over the seeds, as there is one prompt
    assert abs(found["mean"] - exact) < 0.5 < exact  # all particles, not the best of them
    for plot in ("reward_diversity", "judge_reward"):
        assert "exact tilt" in (here / f"run/{plot}.svg").read_text()


def test_equal_calls_are_the_flow_s_own(here):
    """Two evaluations a velocity, three a jump: counted, and forecast, as the run counts them."""
    texts = ["none:steps=2,particles=2", "best-of-n:steps=2", "split:steps=2,particles=2",
             "toy.py:Stirred:steps=2,temperature=1"]  # fmt: skip
    assert run(**{**VECTORS, "model": "toy.py:Twice"}, methods=json.dumps(texts)) == 0
    flow = load_model("toy.py:Twice")
    rows = equal_calls([entry(t) for t in texts], True, flow)
    measured = json.loads((here / "run/figures.json").read_text())["methods"]
    assert len(rows) == 5
    for row in rows:
        each = 1 if row.mean else row.particles
        expected = row.calls(True, flow) / (row.particles / each)
        assert measured[row.label]["nfe"] == expected, row.label
    none, split, beside, stirred, _ = rows
    assert none.each(True, flow) == 6
    assert split.calls(True, flow) == 2 * split.each(True, flow) + 3 * PROBES
    assert beside.particles == split.calls(True, flow) // 6
    own = methods.method("toy.py:Stirred")
    assert stirred.each(True, flow) == plan(own, 2, flow=flow)["nfe"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("toy.py:Stired", "toy.py defines no 'Stired': did you mean Stirred"),
        ("other.py:Kernel", "no file other.py"),
        ("toy.py:Stirred:chrn=1", "option of method 'toy.py:Stirred', 'chrn': did you mean churn"),
        ("toy.py:Needy", "kernel 'Needy' needs more than a flow: give its other arguments"),
        ("toy.py:first", "method 'first' is not a kernel and cannot be called with (flow, reward"),
        ("toy.py:climb:temperature=1", "'toy.py:climb', 'temperature'"),
    ],
)
def test_what_is_no_method_is_refused(text, message, here, capsys):
    assert run(**VECTORS, methods=json.dumps([text])) == 2
    refused(capsys, message)


def test_a_changed_method_is_not_gone_on_with(here, tmp_path, monkeypatch, capsys):
    """Its file is part of what an interrupted comparison must have had in common."""
    own = tmp_path / "own.py"
    own.write_text(FLOW)
    texts = json.dumps(["none:steps=1,particles=2", f"{own}:Stirred:steps=1,temperature=1"])
    real = steer.sample

    def stopped(*args, **kwargs):
        if args[5].name != "none":
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(steer, "sample", stopped)
        assert run(**VECTORS, methods=texts) == 130
    own.write_text(FLOW + "\n")
    assert run(**VECTORS, methods=texts) == 2
    refused(capsys, "other settings, prompts or files", "own.py")
