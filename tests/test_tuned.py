"""`steer eval --lora`: the same noise for all rows, honest calls, whole or absent, resumable."""

import contextlib
import io
import json
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout

import pytest
import torch
import yaml

import steer
from recipes.cli import main
from recipes.entries import entry
from recipes.figures import estimate
from recipes.tuned_report import share
from recipes.tuned_rows import rows_of
from steer.adapters.inject import adapt
from steer.adapters.store import save_adapters
from steer.models.loading import save
from steer.models.two_time import NetworkFlow, TwoTimeUNet
from steer.noise import generator
from steer.sampling.forecast import plan

PROMPTS = ["fox", "bird"]
REDNESS = """
def redness(images):
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))
"""


def network(seed):
    """A small network with weights that say something, on the emoji's words and pixels."""
    config = {**steer.load("emoji").network.config, "channels": [8, 8], "blocks": [1, 1],
              "width": 16}  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        flow = NetworkFlow(TwoTimeUNet(**config))
    for name, p in flow.named_parameters():
        if p.ndim > 1:
            p.data = (
                0.3 * torch.randn(p.shape, generator=generator(seed, name)) / p[0].numel() ** 0.5
            )
    return flow.eval().requires_grad_(False)


def moved(flow, folder, size, seed, **metadata):
    """Adapters that were never trained: B is drawn."""
    tuned = adapt(flow, rank=2, seed=seed)
    with torch.no_grad():
        for name, p in tuned.adapters().items():
            if "lora_B" in name:
                p.copy_(size * torch.randn(p.shape, generator=generator(seed, name)))
    save_adapters(tuned, folder, metadata)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tuned")
    (path / "red.py").write_text(REDNESS)
    with contextlib.chdir(path):
        save(network(0), "net")
        flow = steer.load("net")
        moved(flow, "runs/a", 0.1, 0, reward="red.py:redness")
        moved(flow, "runs/a/best", 0.05, 1, reward="red.py:redness")
        moved(flow, "runs/b", 0.1, 2, reward="red.py:redness")
        moved(network(1), "runs/other", 0.1, 3, reward="red.py:redness")
        moved(flow, "runs/silent", 0.1, 4)
        moved(flow, "runs/plain", 0.1, 5, reward="0.5*brightness - colour:name=red")
    return path


@pytest.fixture
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)
    for name in folders(folder):
        if name != "whole":
            shutil.rmtree(folder / name)
    return folder


def folders(here):
    kept = {"red.py", "__pycache__", "net", "runs", "red.yaml"}
    return sorted(p.name for p in here.iterdir() if p.name not in kept)


def run(*words, **options):
    settings = {
        "model": "net", "prompts": json.dumps(PROMPTS), "particles": 2, "steps": "[1, 4]",
        "lora-scale": "[0, 1]", "guidance": '["fmrg-j:steps=2", "best-of-n:steps=1"]',
        "held-out": "[brightness]", "out": "run", "judge": "embedded",
        "reward": "red.py:redness", **options,
    }  # fmt: skip
    words = words or ("--lora", "runs/a", "--lora", "runs/b")
    return main(["eval", *words, *(f"--{k}={v}" for k, v in settings.items() if v is not None)])


@pytest.fixture(scope="module")
def whole(folder):
    """A comparison in one go: its folder and its numbers."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(folder), redirect_stdout(out), redirect_stderr(err):
        assert run(out="whole") == 0, err.getvalue()
    assert "network calls" in err.getvalue()
    assert (folder / "whole/table.md").read_text() in out.getvalue()
    return folder / "whole", json.loads((folder / "whole/metrics.json").read_text())


def refused(capsys, *parts):
    err = capsys.readouterr().err
    for part in parts:
        assert part in err, err
    assert "Traceback" not in err


def test_rows_stand_beside_what_costs_as_much():
    texts = ["fmrg-j:steps=16", "reno:steps=3", "best-of-n:steps=1", "best-of-n:particles=5"]
    rows = rows_of(["a"], [0.5, 1], [1, 2, 8], [entry(t) for t in texts])
    by = {k: [r.label for r in rows if r.section == k] for k in (1, 2, 8, None)}
    assert by[1] == ["base, 1 step", "a at 0.5, 1 step", "a, 1 step"]
    assert by[2] == ["base, 2 steps", "a at 0.5, 2 steps", "a, 2 steps", "reno, 1 step",
                     "best of 2, 1 step"]  # fmt: skip
    assert by[8][3:] == ["fmrg-j, 2 steps", "reno, 4 steps", "best of 8, 1 step"]
    assert by[None] == ["fmrg-j, 16 steps", "reno, 3 steps", "best of 5, 4 steps", "base, 3 steps",
                        "base, 4 steps", "base, 16 steps"]  # fmt: skip
    for row in rows:
        if row.section:
            assert row.count * plan(row.method, row.steps)["nfe"] <= row.section
    guided = rows_of(["a"], [0.5, 1], [1], [entry("reno:steps=2")], guided_tuned=True)
    assert "reno, 2 steps on a" in [row.label for row in guided]
    with pytest.raises(ValueError, match="set their number with particles"):
        rows_of([], [1], [1], [entry("reno:particles=2")])


def test_the_share_of_two_means_has_an_error():
    a = torch.tensor([1.0, 2.0, 4.0])
    assert share(a, torch.full((3,), 2.0)).error == pytest.approx(estimate(a / 2).error)
    assert share(a, torch.full((3,), torch.nan)) == (None, None)


def test_every_row_is_there_and_costs_what_it_says(here, whole):
    out, metrics = whole
    assert {p.name for p in out.iterdir()} == {
        "table.md", "metrics.json", "front.png", "front.svg", "sheet.png", "config.yaml",
    }  # fmt: skip
    assert folders(here) == ["whole"]
    rows, table = metrics["rows"], (out / "table.md").read_text()
    plain = [f"{who}, {k}" for k in ("1 step", "4 steps") for who in (
        "base", "a at 0", "a", "b at 0", "b", "a/best at 0", "a/best")]  # fmt: skip
    others = ["fmrg-j, 2 steps", "fmrg-j, 1 step", "best of 4, 1 step", "base, 2 steps"]
    assert {*rows} == {*plain, *others}
    for label, row in rows.items():
        assert table.count(f"| {label} | {row['nfe']:g} | ") == 1
        cost = 4 if "best of" in label else plan(row["method"], row["steps"])["nfe"]
        assert row["nfe"] == cost
        assert {"reward", "judge", "held_out/brightness", "diversity", "kept", "kid"} < {
            *row["summary"]
        }
    assert metrics["guided"] == "fmrg-j, 2 steps"


def test_all_rows_have_the_same_noise(whole):
    _, metrics = whole
    rows = metrics["rows"]
    for k in ("1 step", "4 steps"):
        base = rows[f"base, {k}"]
        for name in ("a", "b", "a/best"):
            zero, tuned = rows[f"{name} at 0, {k}"], rows[f"{name}, {k}"]
            assert zero["per_prompt"] == base["per_prompt"]
            assert zero["summary"]["kid"]["mean"] == pytest.approx(0, abs=1e-9)
            assert zero["summary"]["kept"] == {"mean": 1, "error": 0}
            assert zero["drift"] == {"velocity": 0, "jump": 0}
            assert tuned["per_prompt"] != base["per_prompt"]
            assert tuned["drift"]["velocity"] > 0 < tuned["drift"]["jump"]
    best, base = (rows[n]["per_prompt"]["reward"] for n in ("best of 4, 1 step", "base, 1 step"))
    assert all(x > y for x, y in zip(best, base, strict=True))  # the base's own is a candidate
    mine, guided = (torch.tensor(rows[n]["per_prompt"]["judge"]) for n in
                    ("a, 4 steps", "fmrg-j, 2 steps"))  # fmt: skip
    paired = metrics["tuned - guided"]["a, 4 steps"]["fmrg-j, 2 steps"]["judge"]
    assert paired["mean"] == pytest.approx(estimate(mine - guided).mean)
    assert rows["a, 4 steps"]["summary"]["judge - guided"] == paired


def test_what_is_measured_is_what_sample_draws(here, whole):
    _, metrics = whole
    flow = steer.load("net", lora="runs/b")

    def redness(images):
        return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))

    result = steer.sample(flow, redness, PROMPTS, 2, 4, "none", seed=0)
    assert result.rewards.mean(1).tolist() == pytest.approx(
        metrics["rows"]["b, 4 steps"]["per_prompt"]["reward"], abs=1e-5
    )


def test_an_interrupted_comparison_goes_on_from_its_yaml(here, whole, monkeypatch, capsys):
    real, calls = steer.sample, []

    def sample(*args, **kwargs):
        calls.append(kwargs)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    settings = yaml.safe_load((whole[0] / "config.yaml").read_text())
    assert settings["lora"] == {"a": "runs/a", "b": "runs/b"}
    small = {"lora": {"b": "runs/b"}, "steps": [1], "guidance": [], "out": "run"}
    (here / "red.yaml").write_text(yaml.safe_dump({**settings, **small}))
    with monkeypatch.context() as patch:
        patch.setattr(steer, "sample", sample)
        assert main(["eval", "--config", "red.yaml"]) == 130
        assert folders(here) == [".run.partial", "whole"]
        assert main(["eval", "--config=red.yaml", "--seed", "1"]) == 2
        refused(capsys, "other settings", "--overwrite")
        assert main(["eval", "--config", "red.yaml"]) == 0
        assert len(calls) == 1 + 3  # the interrupted one, and each row once
    assert folders(here) == ["run", "whole"]
    rows = json.loads((here / "run/metrics.json").read_text())["rows"]
    assert [*rows] == ["base, 1 step", "b at 0, 1 step", "b, 1 step"]
    for label, row in rows.items():
        assert row["per_prompt"] == whole[1]["rows"][label]["per_prompt"]
    assert main(["eval", "--config", "red.yaml"]) == 0
    assert "is finished" in capsys.readouterr().err
    assert main(["eval", "--config", "red.yaml", "--seed", "1"]) == 2
    refused(capsys, "exists already")


def test_names_seeds_and_no_judge(here, capsys):
    lora = json.dumps({"one": "runs/a", "two": "runs/silent"})
    small = {
        "steps": "[1]",
        "guidance": "[]",
        "lora-scale": "[1]",
        "particles": 1,
        "best": "false",
    }
    assert run("--lora", lora, reward="brightness", judge=None, seeds=2, **small) == 0
    assert "model net has no default judge" in " ".join(capsys.readouterr().err.split())
    rows = json.loads((here / "run/metrics.json").read_text())["rows"]
    assert [*rows] == ["base, 1 step", "one, 1 step", "two, 1 step"]
    assert "judge" not in rows["base, 1 step"]["summary"]
    assert rows["base, 1 step"]["summary"]["diversity"]["mean"] > 0  # of the seeds' pictures


def test_the_reward_that_the_adapters_name_is_taken_where_it_comes_along(here, capsys):
    small = {"steps": "[1]", "guidance": "[]", "lora-scale": "[1]", "judge": None, "reward": None}
    assert run("--lora", "runs/plain", **small) == 0
    assert "'0.5*brightness - colour:name=red'" in " ".join(capsys.readouterr().err.split())
    kept = json.loads((here / "run/metrics.json").read_text())
    assert kept["reward"] == "0.5*brightness - colour:name=red"
    assert run("--lora", "runs/a", **small, overwrite="true") == 2
    refused(capsys, "tuned for 'red.py:redness'", "not imported, run or downloaded", "--reward")


@pytest.mark.parametrize(
    ("words", "options", "parts"),
    [
        (["--lora=[]"], {}, ["no adapters", "--lora"]),
        (["--lora", "runs/none"], {}, ["no folder of adapters at runs/none"]),
        (["--lora", "runs/other"], {}, ["were made for", "load the base"]),
        (
            ["--lora", "runs/silent"],
            {"reward": None},
            ["which reward", "does not say", "--reward"],
        ),
        (["--lora", "runs/a", "--lora", "runs/../runs/a"], {}, ["two folders", "'a'"]),
        ((), {"reward": "brightnes"}, ["brightnes", "did you mean brightness"]),
        ((), {"prompts": "[]"}, ["list of prompts is empty"]),
        ((), {"prompts": "nothing.txt"}, ["nothing.txt"]),
        ((), {"prompts": None}, ["model 'net' has no default prompts"]),
        ((), {"particles": 0}, ["particles must be at least 1"]),
        ((), {"steps": "[0]"}, ["steps must be at least 1"]),
        ((), {"steps": "[]"}, ["list of steps is empty"]),
        ((), {"guidance": "[fmr]"}, ["unknown method 'fmr'"]),
        ((), {"guidance": '["reno:rate=-1"]'}, ["rate"]),
        ((), {"repeats": 2}, ["option 'repeats'"]),
    ],
)
def test_what_cannot_be_compared_is_refused(words, options, parts, here, capsys):
    assert run(*words, **options) == 2
    refused(capsys, *parts)
    assert not {*folders(here)} & {"run", ".run.partial"}


def test_an_empty_file_of_prompts_is_refused(here, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("\n\n")
    assert run(prompts=tmp_path / "empty.txt") == 2
    refused(capsys, "has no prompts")


def test_eval_without_adapters_is_the_model_s_own(here, capsys):
    assert main(["eval", "--lora-scale", "[1]"]) == 2
    refused(capsys, "unknown option 'lora_scale'")


@pytest.mark.slow
def test_two_processes_compare_what_one_does(here):
    run = [
        sys.executable, "-W", "ignore", "-m", "recipes.cli", "eval", "--lora", "runs/a",
        "--model", "net", "--prompts", "[fox, bird]", "--particles", "2", "--steps", "[1]",
        "--lora-scale", "[1.0]", "--guidance", '["none:steps=1"]', "--judge", "null",
        "--reward", "colour:name=red", "--device", "cpu",
    ]  # fmt: skip
    for out, options in {"one": [], "two": ["--devices", "2"]}.items():
        subprocess.run([*run, "--out", out, *options], check=True, timeout=300)
    one, two = (json.loads((here / n / "metrics.json").read_text()) for n in ("one", "two"))
    assert _without_seconds(one) == _without_seconds(two)
    shutil.rmtree(here / "one")
    shutil.rmtree(here / "two")


def _without_seconds(value):
    if isinstance(value, dict):
        return {k: _without_seconds(v) for k, v in value.items() if k != "seconds"}
    if isinstance(value, list):
        return [_without_seconds(v) for v in value]
    return pytest.approx(value, abs=1e-4) if isinstance(value, float) else value
