"""The program: run folders whole or absent, resume, and errors that name the mend."""

import json
import os
import resource
import shlex
import subprocess
import sys

import pytest
import torch
import yaml
from PIL import Image

import recipes.sample
import rewards
import steer
from recipes.arguments import CONFIGS, LATER, option_names, parse
from recipes.cli import main
from recipes.commands import COMMANDS
from recipes.identity import fingerprints
from recipes.inputs import load_model
from steer.adapters.inject import adapt
from steer.adapters.store import save_adapters
from steer.sampling.forecast import plan as planned
from steer.sampling.methods import TABLE

FLOW = '''
import torch, steer

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

    def velocity(self, x, t):
        return super().velocity(x, t) + self.layer(x)

    def jump(self, x, s, t):
        return super().jump(x, s, t) + (t - s) * self.layer(x)

def Vectors():
    return steer.GaussianMixture(torch.zeros(1, 2), 1.0)

def redness(images):
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))

class Wrong(steer.Reward):
    def forward(self, images, prompts=None, metadata=None):
        return images.mean()

class NotANumber(steer.Reward):
    def forward(self, images, prompts=None, metadata=None):
        return images.mean((1, 2, 3)).masked_fill(torch.arange(len(images)) == 1, torch.nan)
'''


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "toy.py").write_text(FLOW)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*words, **options):
    settings = {
        "model": "toy.py:Pixels", "reward": "toy.py:redness", "steps": 3, "particles": 3,
        "temperature": 0.05, "out": "run", "prompt": '["a", "b"]', **options,
    }  # fmt: skip
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in settings.items() if v is not None]
    return main(["sample", *words, *flags])


def folders(here):
    return sorted(p.name for p in here.iterdir() if p.name not in {"toy.py", "__pycache__"})


def refused(capsys, *parts, code=2):
    err = capsys.readouterr().err
    for part in parts:
        assert part in err, err
    assert "Traceback" not in err


def test_run_folder_is_complete(here, capsys):
    assert run() == 0
    assert "reward calls" in capsys.readouterr().err
    out = here / "run"
    names = {"config.yaml", "images", "grid.png", "scores.jsonl", "metrics.json"}
    assert {p.name for p in out.iterdir()} == names
    scores = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    assert [s["prompt"] for s in scores] == ["a"] * 3 + ["b"] * 3
    assert sum(s["best"] for s in scores) == 2
    assert all((out / s["image"]).exists() for s in scores)
    metrics = json.loads((out / "metrics.json").read_text())
    assert len(metrics["log_z"]) == 2
    assert len(metrics["trace"]["ess"]) == 3
    assert metrics["nfe_per_particle"] > 3
    assert metrics["peak_memory"]["cpu_mb"] > 0
    header = (out / "config.yaml").read_text().splitlines()[0]
    assert "torch" in header
    assert steer.__version__ in header
    assert folders(here) == ["run"]
    assert Image.open(out / "grid.png").size[1] > 4 * 96  # two prompts, unguided and guided


def test_config_of_a_run_reproduces_it(here):
    assert run(prompt='["a"]') == 0
    settings = yaml.safe_load((here / "run" / "config.yaml").read_text())
    settings["out"] = "again"
    (here / "again.yaml").write_text(yaml.safe_dump(settings))
    assert main(["sample", "--config", "again.yaml"]) == 0
    first, second = ((here / d / "scores.jsonl").read_text() for d in ("run", "again"))
    assert first == second


def test_guided_beats_unguided(here):
    assert run(particles=16, steps=6) == 0
    metrics = json.loads((here / "run" / "metrics.json").read_text())
    plain = steer.sample(
        load_model("toy.py:Pixels"),
        rewards.load("toy.py:redness"),
        ["a", "b"],
        particles=16,
        steps=6,
        method="none",
    )
    assert min(metrics["reward_mean"]) > float(plain.rewards.mean()) + 0.2


def test_keep_best(here):
    assert run(keep="best") == 0
    assert len(list((here / "run" / "images").iterdir())) == 2


def test_terms_of_a_sum_are_scored(here):
    assert run(reward="toy.py:redness + 0.5*brightness") == 0
    line = json.loads((here / "run" / "scores.jsonl").read_text().splitlines()[0])
    a, b = line["terms"]["redness"], line["terms"]["Brightness"]
    assert line["reward"] == pytest.approx(a + 0.5 * b, abs=1e-5)


def test_prompts_file(here):
    (here / "p.txt").write_text("ein Apfel\n\n  größer \n", encoding="utf-8")
    assert run(prompt=None, prompts_file=here / "p.txt") == 0
    scores = [json.loads(s) for s in (here / "run" / "scores.jsonl").read_text().splitlines()]
    assert {s["prompt"] for s in scores} == {"ein Apfel", "größer"}


def test_an_interrupted_run_resumes_where_it_stopped(here, monkeypatch):
    """Interrupt between groups of prompts: the finished ones are kept, the sums are the same."""
    prompts = json.dumps([f"p{i}" for i in range(5)])
    assert run(prompt=prompts, particles=32, out="whole") == 0
    real, calls = steer.sample, []

    def sample(*args, **kwargs):
        calls.append(kwargs["position"])
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(steer, "sample", sample)
    assert run(prompt=prompts, particles=32) == 130
    assert folders(here) == [".run.partial", "whole"]
    calls.clear()
    calls.extend([-1] * 4)
    assert run(prompt=prompts, particles=32) == 0
    assert calls[4:] == [2, 2, 4, 4]  # the group of prompts 0 and 1 was done
    assert folders(here) == ["run", "whole"]
    a, b = ((here / d / "scores.jsonl").read_text() for d in ("run", "whole"))
    assert a == b


def test_other_settings_do_not_resume_an_interrupted_run(here, monkeypatch, capsys):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        prompts = json.dumps([f"p{i}" for i in range(3)])
        real, calls = steer.sample, []

        def second(*args, **kwargs):
            calls.append(0)
            return real(*args, **kwargs) if len(calls) < 3 else stop()

        m.setattr(steer, "sample", second)
        assert run(prompt=prompts, particles=32) == 130
    assert run(prompt=prompts, particles=32, seed=1) == 2
    refused(capsys, "other settings", "--overwrite")
    assert run(prompt=prompts, particles=32, seed=1, overwrite="true") == 0


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"model": "emojy"}, ["emojy", "did you mean", "emoji"]),
        ({"model": "nowhere.py:Pixels"}, ["nowhere.py"]),
        ({"reward": "brightnes"}, ["brightnes", "brightness"]),
        ({"reward": "toy.py:Redness"}, ["Redness", "toy.py"]),
        ({"method": "fmt"}, ["unknown method 'fmt'", "fmtt"]),
        ({"prompt": "[]"}, ["empty"]),
        ({"prompt": None, "prompts_file": "none.txt"}, ["none.txt"]),
        ({"particles": 0}, ["particles must be at least 1"]),
        ({"steps": 0}, ["steps must be at least 1"]),
        ({"strength": 2}, ["temperature and strength both given"]),
        ({"temperature": -1}, ["temperature", "above zero"]),
        ({"reward": "toy.py:Wrong"}, ["shape ()", "one number per image"]),
        ({"reward": "toy.py:NotANumber"}, ["nan", "prompt 0", "'a'", "particle 1", "step 1"]),
        ({"method": "fmtt", "reward": "jpeg"}, ["gradient", "not differentiable", "split"]),
        ({"method": "split", "scale": 2}, ["'split'", "'scale'"]),
        ({"particle": 3}, ["particle", "particles"]),
        ({"dtype": "float8"}, ["float8", "bfloat16"]),
        ({"device": "toaster"}, ["toaster", "--device cpu"]),
        ({"method": "none"}, ["'none'", "no temperature"]),
        ({"method": "reno"}, ["'reno'", "no temperature", "fmtt"]),
        ({"model": "toy.py:Vectors"}, ["not a picture"]),
        ({"window": "[0.5, 0.1]"}, ["guidance window from 0.5 to 0.1"]),
        ({"cfg": 2}, ["Pixels takes no prompts", "leave cfg"]),
        ({"negative_prompt": "b"}, ["without cfg"]),
        ({"model": "toy.py:Net", "cfg": 2}, ["Net takes no prompts"]),
        ({"init_image": "none.png"}, ["no file 'none.png'", "--init-image=picture.png"]),
        ({"init_image": "toy.py"}, ["cannot read 'toy.py' as a picture", "PNG"]),
        ({"init_time": 0.5}, ["init_image"]),
        ({"method": "reno", "temperature": None, "init_image": "p.png"}, ["pure noise", "split"]),
        ({"method": "none", "temperature": None, "target": 1}, ["cannot stop at a target"]),
        ({"budget": 1}, ["a budget of 1 NFE a particle is too small", "at least"]),
        ({"method": "fmtt", "brake": 1}, ["'fmtt' takes no option 'brake'"]),
        ({"lora": "none"}, ["no folder of adapters at none"]),
        ({"lora_scale": 0.5}, ["lora_scale needs adapters", "--lora FOLDER"]),
    ],
    ids=lambda v: str(v)[:40],
)
def test_bad_input_is_refused_with_its_mend(here, capsys, options, parts):
    if options.get("init_image") == "p.png":
        Image.new("RGB", (4, 4)).save(here / "p.png")
    assert run(**options) == 2
    refused(capsys, "error: ", *parts)
    assert [name for name in folders(here) if name != "p.png"] == []


def test_a_start_from_a_picture(here):
    """A red picture with little noise stays red; half transparent ones lie on white."""
    Image.new("RGBA", (9, 12), (255, 40, 40, 255)).save(here / "red.png")
    near = {"init_image": "red.png", "method": "none", "temperature": None}
    assert run(**near, init_time=0.97) == 0
    red = [json.loads(line)["reward"] for line in (here / "run/scores.jsonl").open()]
    assert min(red) > 0.5
    assert run("--overwrite", **near, init_time=0.05) == 0
    any_colour = [json.loads(line)["reward"] for line in (here / "run/scores.jsonl").open()]
    assert min(any_colour) < 0
    config = yaml.safe_load((here / "run/config.yaml").read_text())
    assert config["init_image"] == "red.png"
    assert config["init_time"] == 0.05


@pytest.mark.parametrize(
    "options",
    [
        {"method": "fmrg-j", "scale": 0.5, "window": "[0, 0.7]", "every": 2, "lookahead": 2},
        {"method": "reno", "rate": 0.2, "brake": 0.5, "jumps": 2, "finish": 3},
        {"method": "fmtt", "temperature": 0.05, "clip": 3.0, "settle": "false"},
        {"method": "fmrg-j", "target": 0.2},
        {"temperature": 0.05, "budget": 5},
    ],
    ids=str,
)
def test_controls_reach_the_method(here, options, capsys):
    assert run(**{"temperature": None, **options}) == 0
    settings = {k: yaml.safe_load(str(v)) for k, v in options.items()}
    reward = rewards.load("toy.py:redness")
    flow = load_model("toy.py:Pixels")
    expected = steer.sample(flow, reward, ["a", "b"], 3, 3, **settings)
    scores = [json.loads(line)["reward"] for line in (here / "run/scores.jsonl").open()]
    assert scores == pytest.approx(expected.rewards.flatten().tolist(), abs=1e-5)
    metrics = json.loads((here / "run/metrics.json").read_text())
    assert metrics["method"] == options.get("method", "renoise")
    early = "target" in options or "budget" in options
    assert ("at most" in capsys.readouterr().err) == early


def test_groups_that_stop_at_different_times_are_joined(here):
    """Two groups of prompts, the second smaller: traces are filled up, costs are means."""
    flow = load_model("toy.py:Pixels")
    reward = rewards.load("toy.py:redness")
    settings = {"method": "fmrg-j", "target": 0.3}
    expected = steer.sample(flow, reward, ["a", "b", "c"], 32, 6, **settings)
    prompt = '["a", "b", "c"]'
    assert run(prompt=prompt, temperature=None, particles=32, steps=6, **settings) == 0
    metrics = json.loads((here / "run/metrics.json").read_text())
    assert metrics["nfe_per_particle"] == pytest.approx(expected.nfe)
    assert metrics["reward_calls"] == pytest.approx(expected.costs["reward_calls"])
    scores = [json.loads(line)["reward"] for line in (here / "run/scores.jsonl").open()]
    assert scores == pytest.approx(expected.rewards.flatten().tolist(), abs=1e-5)


def test_other_weights_do_not_resume_an_interrupted_run(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    spec = f"0.5*clip + similarity:image={tmp_path / 'a.png'},by=luma"
    before = fingerprints("emoji", spec)
    assert any("zoo/emoji/model.safetensors" in name for name in before)
    assert any("zoo/clip" in name for name in before)
    Image.new("RGB", (4, 4), "red").save(tmp_path / "a.png")
    after = fingerprints("emoji", spec)
    assert {k for k in before if before[k] != after[k]} == {str(tmp_path / "a.png")}


@pytest.fixture
def tuned(here):
    """Adapters for toy.py:Net, in the folder "lora"."""
    tuned = adapt(load_model("toy.py:Net"), rank=1)
    for p in tuned.adapters().values():
        p.data += 0.5
        p.data[0] *= 2  # more red than green and blue
    save_adapters(tuned, "lora")
    return tuned


@pytest.mark.parametrize("method", ["fmtt", "none"])
def test_adapters_are_sampled_at_their_scale(here, tuned, method):
    options = {"method": method, "temperature": 0.05 if method == "fmtt" else None}
    assert run(model="toy.py:Net", lora="lora", lora_scale=0.7, **options) == 0
    config = yaml.safe_load((here / "run/config.yaml").read_text())
    assert (config["lora"], config["lora_scale"]) == ("lora", 0.7)
    reward = rewards.load("toy.py:redness")
    expected = steer.sample(tuned.at(0.7), reward, ["a", "b"], 3, 3, **options)
    scores = [json.loads(line)["reward"] for line in (here / "run/scores.jsonl").open()]
    assert scores == pytest.approx(expected.rewards.flatten().tolist(), abs=1e-5)
    base = steer.sample(tuned.base, reward, ["a", "b"], 3, 3, **options)
    assert float((base.rewards - expected.rewards).abs().max()) > 0.01
    assert run("--config", "run/config.yaml", model=None, out="again", prompt=None, reward=None,
               steps=None, particles=None, temperature=None) == 0  # fmt: skip
    assert (here / "again/scores.jsonl").read_text() == (here / "run/scores.jsonl").read_text()


def test_guidance_stands_beside_the_unguided_tuned_map(here, tuned, monkeypatch):
    """Three rows of the grid: the base's, the tuned map's, the guided ones, of the same seeds."""
    kept = {}
    monkeypatch.setattr(
        recipes.sample, "save_result", lambda result, out, *a, **k: kept.update(k, guided=result)
    )
    assert run(model="toy.py:Net", lora="lora", lora_scale=0.02) == 0  # pictures, not mere white
    for title, scale in (("base, unguided", 0.0), ("tuned, unguided", 0.02)):
        plain = steer.sample(
            tuned.at(scale), rewards.load("toy.py:redness"), ["a", "b"], 3, 3, "none"
        )
        torch.testing.assert_close(kept["beside"][title].x, plain.x)
        assert float(kept["guided"].rewards.mean()) > float(plain.rewards.mean())
    assert list(kept["beside"]) == ["base, unguided", "tuned, unguided"]


def test_other_adapters_do_not_resume_an_interrupted_run(here, tuned, monkeypatch, capsys):
    real, calls = steer.sample, []

    def second(*args, **kwargs):
        calls.append(0)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    settings = {"model": "toy.py:Net", "lora": "lora", "particles": 32, "prompt": '["a","b","c"]'}
    with monkeypatch.context() as m:
        m.setattr(steer, "sample", second)
        assert run(**settings) == 130
    next(iter(tuned.adapters().values())).data += 0.5
    save_adapters(tuned, "lora")
    assert run(**settings) == 2
    refused(capsys, "other settings, prompts or files", "--overwrite")
    assert run("--overwrite", **settings) == 0


def test_classifier_free_guidance_is_counted_twice(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["--prompt=fox", "--reward=brightness", "--particles=1", "--steps=1", "--out=run"]
    words += ["--method=none", "--cfg=1.5", "--negative-prompt=cat"]
    assert main(["sample", *words]) == 0
    assert json.loads((tmp_path / "run/metrics.json").read_text())["nfe_per_particle"] == 2
    assert "x 2 NFE = 2 network calls" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("option", LATER)
def test_options_that_the_model_cannot_use_are_refused_by_name(here, capsys, option):
    assert run(f"--{option}=1") == 2
    refused(capsys, option, "leave it out")


@pytest.mark.parametrize(
    ("command", "content", "words", "parts"),
    [
        ("sample", "prompts: [a]", (), ["c.yaml: unknown option 'prompts'", "mean prompt"]),
        ("sample", "partcles: {a: 1}", (), ["c.yaml: unknown option 'partcles'", "particles"]),
        ("sample", "foo: {bar: 1}\nstps: 2", (), ["option 'foo'", "'stps': did you mean steps"]),
        ("sample", "seed: 1", ("--partcles=3",), ["unknown option 'partcles'", "mean particles"]),
        ("sample", "seed: 1", ("--see.a", "3"), ["unknown option 'see.a'", "Known: ", "seed"]),
        ("finetune", "optons: {anchor: 1}", (), ["unknown option 'optons'", "mean options"]),
        ("finetune", "rnk: 2", (), ["unknown option 'rnk'", "mean rank"]),
        ("finetune", "options: {anchr: 1}", (), ["'anchr'", "anchor"]),
        ("eval", "lora: runs/a\nbst: true", (), ["unknown option 'bst'", "mean best"]),
        ("sample", "- prompt", (), ["c.yaml has no settings"]),
        ("sample", "prompt: [", (), ["c.yaml is not a YAML file"]),
        ("sample", "prompt: " + "[" * 3000 + "]" * 3000, (), ["c.yaml is nested too deeply"]),
        ("sample", "particles: null", (), ["c.yaml: particles is null", "default (4)"]),
        ("finetune", "rank: null", (), ["c.yaml: rank is null", "default (16)"]),
        ("sample", "particles: many", (), ["particles", "many"]),
    ],
)
def test_settings_are_refused_by_their_names(here, capsys, command, content, words, parts):
    (here / "c.yaml").write_text(content)
    assert main([command, "--config", "c.yaml", *words]) == 2
    err = capsys.readouterr().err
    assert all(part in err for part in parts), err
    assert err.count("\n") == 1
    assert err.startswith("error: ")


def test_a_null_is_a_value_where_there_may_be_none(here, capsys):
    (here / "c.yaml").write_text("judge: null\ntemperature: null\nmethods: [fmt]\n")
    assert main(["compare", "--config", "c.yaml"]) == 2
    refused(capsys, "unknown option 'temperature'")
    (here / "c.yaml").write_text("judge: null\nmethods: [fmt]\n")
    assert main(["compare", "--config", "c.yaml"]) == 2
    refused(capsys, "unknown method 'fmt'")


def test_settings_that_come_along_are_found(here, capsys):
    call = parse("sample", ["--config", "demo.yaml", "--seed", "3"])
    assert call.settings["prompt"] == ["animal", "food", "plant"]
    assert call.settings["seed"] == 3
    told = capsys.readouterr().err
    assert f"config: {CONFIGS / 'demo.yaml'}, from the package" in told
    assert parse("sample", ["--config=recipes/configs/demo.yaml"]).settings["steps"] == 8
    (here / "demo.yaml").write_text("steps: 5\n")
    capsys.readouterr()
    assert parse("sample", ["--config=demo.yaml"]).settings["steps"] == 5
    assert capsys.readouterr().err == ""
    assert main(["sample", "--config", "dmo.yaml"]) == 2
    refused(capsys, "no config file dmo.yaml: did you mean demo.yaml", "compare.yaml")


EXAMPLES = [(name, line) for name, command in COMMANDS.items() for line in command.examples]


@pytest.mark.parametrize(("name", "line"), EXAMPLES)
def test_examples_of_the_help_are_read(here, name, line):
    command, *words = shlex.split(line.partition(" > ")[0])
    call = parse(command, words)
    assert call.settings is not None
    assert call.command.split()[0] == command
    assert name in (call.command, "models", "methods", "objectives", "rules")


@pytest.mark.parametrize("command", [name for name, c in COMMANDS.items() if c.options])
def test_options_stand_in_one_group_each(command):
    grouped = [name for names in COMMANDS[command].options.values() for name in names.split()]
    assert sorted([*grouped, "config"]) == sorted(option_names(command))


def test_shells_complete(here, capsys):
    assert main(["completion", "bash"]) == 0
    (here / "steer.sh").write_text(capsys.readouterr().out)
    typed = ["steer sam", "steer sample --pro", "steer compare --method fm", "steer eval --lora-"]
    asked = [
        f"COMP_WORDS=({line}); COMP_CWORD={len(line.split()) - 1}; _steer; echo ${{COMPREPLY[@]}}"
        for line in typed
    ]
    script = "; ".join(["source steer.sh", *asked])
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "sample", "--prompt --prompts-file", "fmtt fmrg-j fmrg-e", "--lora-scale",
    ]  # fmt: skip
    assert main(["completion", "fish"]) == 2
    refused(capsys, "fish")


@pytest.mark.parametrize(
    "words",
    [["--help"], ["--version"], ["methods", "--names"], ["models"], ["objectives"], ["rewards"]],
)
def test_names_and_help_need_no_torch(words):
    code = f"import sys; from recipes.cli import main; main({words}); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.splitlines()[-1].split())
    assert "recipes.cli" in loaded
    assert not loaded & {"torch", "numpy", "PIL", "rewards.loading"}


def heard(stdout, *words, **options):
    """Run the program with its output going there: exit code, and what it said of it."""
    command = [sys.executable, "-m", "recipes.cli", *words]
    done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False)
    return done.returncode, done.stderr


def test_output_that_cannot_be_written_is_no_full_disk(here):
    with open("/dev/full", "w") as full:
        code, err = heard(full, "methods")
    assert code == 141
    assert err.count("\n") == 1
    assert "standard output was closed or is full" in err
    reader, writer = os.pipe()
    os.close(reader)
    code, err = heard(writer, "--help")
    os.close(writer)
    assert code == 141
    assert err.count("\n") == 1
    assert "files are written completely" in err


BROKEN = """
import sys
import torch
import steer
from toy import Pixels

def attribute(images):
    return images.nope()

def key(images):
    return {}["x"]

def value(images):
    return torch.stack([])

def leaves(images):
    sys.exit(0)

def memory(images):
    return torch.empty(10**15)

class Stuck(Pixels):
    def jump(self, x, s, t):
        return 1 / 0
"""


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"reward": "broken.py:attribute"}, ["AttributeError", "nope", "return images.nope()"]),
        ({"reward": "broken.py:key"}, ["KeyError: 'x'", 'return {}["x"]']),
        ({"reward": "broken.py:value"}, ["torch.stack([])"]),
        ({"reward": "broken.py:leaves"}, ["ended the program", "sys.exit(0)"]),
        ({"model": "broken.py:Stuck"}, ["ZeroDivisionError", "return 1 / 0"]),
        ({"reward": "unread.py:f"}, ["SyntaxError", "unread.py, line 1: def f(:"]),
    ],
    ids=lambda v: str(v)[:40],
)
def test_faults_of_a_user_s_file_show_its_line(here, capsys, monkeypatch, options, parts):
    monkeypatch.syspath_prepend(here)
    (here / "broken.py").write_text(BROKEN)
    (here / "unread.py").write_text("def f(:\n")
    assert run(**{"prompt": "a", **options}) == 2
    file = next(iter(options.values())).split(":")[0]
    refused(capsys, f"({file}, line " if file == "broken.py" else file, *parts)
    assert not (here / "run").exists()


def test_memory_that_is_not_there(here, capsys, monkeypatch):
    monkeypatch.syspath_prepend(here)
    (here / "broken.py").write_text(BROKEN)
    assert run(reward="broken.py:memory") == 2
    refused(capsys, "out of memory: reduce the size of a call", "fewer particles")


def test_a_fault_of_the_program_shows_where_it_is(monkeypatch):
    monkeypatch.setattr(steer, "METHODS", None)
    with pytest.raises(AttributeError, match="items"):
        main(["methods"])


@pytest.mark.parametrize("name", ["o[/x]", "[bold]", ":cat:"])
def test_brackets_in_a_folder_s_name_are_no_markup(here, capsys, name):
    assert run(out=name) == 0
    assert f"see {name}/grid.png" in " ".join(capsys.readouterr().err.split())
    assert (here / name / "grid.png").exists()


def test_a_file_of_json_lines_says_what_the_reward_is_asked(here, capsys):
    (here / "said.py").write_text(
        "import torch\n"
        "def length(images, prompts):\n"
        "    return images.mean((1, 2, 3)) * 0 + torch.tensor([float(len(p)) for p in prompts])\n"
    )
    lines = [{"prompt": "p"}, {"prompt": "q", "reward_prompt": "long\u2028er"}]
    (here / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    settings = {"prompt": None, "prompts_file": "p.jsonl", "reward": "said.py:length"}
    assert run(method="none", temperature=None, **settings) == 0
    scores = [json.loads(line) for line in (here / "run/scores.jsonl").open(newline="\n")]
    assert [(s["prompt"], s["reward_prompt"]) for s in scores[::3]] == [
        ("p", "p"),
        ("q", "long er"),
    ]
    assert [s["reward"] for s in scores[::3]] == [1, 7]
    assert run(reward_prompt="r", out="other", **settings) == 2
    refused(capsys, "p.jsonl has prompts for the reward, and so has reward_prompt")


def test_a_model_of_one_s_own_has_no_reward(here, capsys):
    assert run(reward=None) == 2
    refused(capsys, "'toy.py:Pixels' has no default reward", "--reward")


def test_unknown_command(capsys):
    assert main(["smaple"]) == 2
    refused(capsys, "unknown command 'smaple'", "sample")


def test_edited_prompts_do_not_resume_an_interrupted_run(here, monkeypatch, capsys):
    """The same command with other prompts in the file is another run."""
    file = here / "p.txt"
    file.write_text("old0\nold1\nold2\n")
    real, calls = steer.sample, []

    def second(*args, **kwargs):
        calls.append(0)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    with monkeypatch.context() as m:
        m.setattr(steer, "sample", second)
        assert run(prompt=None, prompts_file=file, particles=32) == 130
    file.write_text("new0\nnew1\nnew2\n")
    assert run(prompt=None, prompts_file=file, particles=32) == 2
    refused(capsys, "prompts", "--overwrite")
    assert run("--overwrite", prompt=None, prompts_file=file, particles=32) == 0
    lines = (here / "run" / "scores.jsonl").read_text().splitlines()
    assert {json.loads(line)["prompt"] for line in lines} == {"new0", "new1", "new2"}


def test_a_run_that_was_whole_when_it_was_killed_is_finished(here, monkeypatch, capsys):
    """The same command again is satisfied; another one, or of edited files, is refused."""

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr("recipes.partial.Partial.drop", stop)
        assert run() == 130
    assert folders(here) == [".run.partial", "run"]
    before = {p: p.stat().st_mtime_ns for p in (here / "run").rglob("*")}
    with monkeypatch.context() as m:
        m.setattr(steer, "sample", stop)  # nothing is drawn
        assert run() == 0
    assert "run is finished: see grid.png in it" in capsys.readouterr().err
    assert folders(here) == ["run"]
    assert {p: p.stat().st_mtime_ns for p in (here / "run").rglob("*")} == before
    assert main(["sample", "--config", "run/config.yaml"]) == 0
    assert "run is finished" in capsys.readouterr().err
    for other in ({"seed": 1}, {"prompt": '["a", "c"]'}, {"keep": "best"}):
        assert run(**other) == 2
        refused(capsys, "exists already", "--overwrite")
    (here / "toy.py").write_text(FLOW + "\n")
    assert run() == 2
    refused(capsys, "exists already")
    assert run("--overwrite") == 0
    assert "reward calls" in capsys.readouterr().err
    (here / "run" / "config.yaml").write_text("\x00\n")
    assert run() == 2
    refused(capsys, "exists already")


def test_a_late_error_keeps_finished_prompts(here, capsys):
    """A NaN for the third prompt: the first two are done, and stay so until it is mended."""
    (here / "late.py").write_text(
        "import torch\n"
        "def late(images, prompts):\n"
        "    bad = torch.tensor([p == 'p2' for p in prompts])\n"
        "    return images.mean((1, 2, 3)).masked_fill(bad, torch.nan)\n"
    )
    prompts = json.dumps(["p0", "p1", "p2"])
    assert run(prompt=prompts, particles=32, reward="late.py:late") == 2
    refused(capsys, "prompt 2 ('p2')")
    assert (here / ".run.partial" / "000000.safetensors").exists()
    assert not (here / "run").exists()


def test_existing_folder_is_left_alone(here, capsys):
    (here / "run").mkdir()
    (here / "run" / "mine.txt").write_text("mine")
    assert run() == 2
    refused(capsys, "exists already", "--overwrite")
    assert run("--overwrite") == 2
    refused(capsys, "run is not changed", "no run of flowsteer, but mine.txt", "move that away")
    assert (here / "run" / "mine.txt").read_text() == "mine"
    (here / "run" / "mine.txt").unlink()
    assert run("--overwrite") == 0
    assert run("--overwrite") == 0


def test_full_disk_leaves_nothing_half_written(here):
    """A file-size limit stands in for a full disk: the system refuses the write alike."""
    words = ["--model=toy.py:Pixels", "--reward=toy.py:redness", "--prompt=a", "--steps=2"]
    words += ["--particles=64", "--temperature=0.1", "--out=run"]
    done = subprocess.run(
        [sys.executable, "-m", "recipes.cli", "sample", *words],
        cwd=here,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "disk is full" in done.stderr
    assert "Traceback" not in done.stderr
    assert folders(here) == []


@pytest.mark.parametrize("command", ["models", "rewards", "methods"])
def test_lists(command, capsys):
    assert main([command]) == 0
    names = {"models": steer.MODELS, "rewards": rewards.NAMES, "methods": steer.METHODS}[command]
    out = capsys.readouterr().out
    assert all(name in out for name in names)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    assert main([*command.split(), "--help"]) == 0
    out = capsys.readouterr().out
    assert "usage: steer" in out
    assert all(f"steer {example}" in out for example in COMMANDS[command].examples)


def test_plan_is_what_is_counted(here):
    flow = load_model("toy.py:Pixels")
    reward = rewards.load("toy.py:redness")
    for method in steer.METHODS:
        for steps in (1, 4):
            plan = planned(method, steps)
            climbs = not TABLE[method].tempered and method not in {"none", "best-of-n"}
            result = steer.sample(
                flow, reward, "a", 2, steps, method, temperature=None if climbs else 1.0
            )
            assert result.nfe == plan["nfe"], method
            assert result.costs["reward_calls"] == plan["reward_calls"], method


def test_result_save(here):
    flow = load_model("toy.py:Pixels")
    result = steer.sample(flow, lambda x: x[:, 0].mean((1, 2)), "a", particles=2, steps=2)
    result.save("saved")
    assert {p.name for p in (here / "saved").iterdir()} == {
        "images", "grid.png", "scores.jsonl", "metrics.json",
    }  # fmt: skip
    with pytest.raises(FileExistsError, match="exists already"):
        result.save("saved")
    vectors = steer.sample(steer.GaussianMixture(torch.zeros(1, 2), 1.0), lambda x: x[:, 0], None)
    with pytest.raises(ValueError, match="no pixels"):
        vectors.save("vectors")


def test_earlier_names_of_options_are_told_by_todays():
    from recipes.arguments import EARLIER
    from steer.tuning.settings import RENAMED

    assert EARLIER["finetune"] == RENAMED
    with pytest.raises(ValueError, match="unknown option 'clip': it is called gradient_clip now"):
        parse("finetune", ["--clip", "1"])


def test_a_misspelt_model_is_answered_with_the_nearest(here, capsys):
    for command in ("sample", "compare", "finetune"):
        assert main([command, "--model", "emojy", "--out", "o"]) == 2
        refused(capsys, "unknown model 'emojy'", "emoji")


def test_a_misspelt_rule_is_refused_before_the_velocity_is_trained(here, capsys):
    assert main(["train", "--rule", "psdm", "--out", "o"]) == 2
    refused(capsys, "psdm", "psd-m")
    assert not (here / "o").exists()


@pytest.mark.parametrize("command", [["studio"], ["serve-reward", "brightness"]])
def test_a_port_that_is_none_is_refused(here, capsys, command):
    assert main([*command, "--port", "99999"]) == 2
    refused(capsys, "port must be from 0 to 65535, got 99999")


def test_the_advice_on_a_token_can_be_pasted(here, capsys, monkeypatch):
    monkeypatch.delenv("FLOWSTEER_REWARD_TOKEN", raising=False)
    assert main(["serve-reward", "brightness", "--host", "0.0.0.0"]) == 2
    refused(capsys, "FLOWSTEER_REWARD_TOKEN=$(openssl rand -hex 16)")


def test_lines_of_progress_count_the_steps_of_all_batches(here, monkeypatch):
    from recipes import terminal

    said = []

    class Kept(terminal.Lines):
        def update(self, task, **changed):
            super().update(task, **changed)
            said.append((self.done, self.total))

    monkeypatch.setattr(terminal, "Lines", Kept)
    words = [
        "sample",
        "--model",
        "fashion",
        "--reward",
        "brightness",
        "--prompt",
        "[bag, coat, boot]",
    ]
    words += ["--particles", "2", "--steps", "2", "--batch-size", "2", "--out", "o"]
    assert main([*words, "--unguided", "false"]) == 0
    assert said[-1] == (6, 6)
    assert max(done for done, _ in said) == 6
