"""`steer sample`: what stands beside the guided pictures, what is warned of, and how far it is."""

import io
import json

import pytest
from PIL import Image
from rich.console import Console

import recipes.terminal
import rewards
import steer
from recipes.cli import main
from recipes.inputs import load_model
from recipes.terminal import Lines, progress
from steer.adapters.inject import adapt
from steer.adapters.store import save_adapters
from tests.test_compare import FLOW


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy.py").write_text(FLOW)
    return tmp_path


def run(*words, **options):
    settings = {
        "model": "toy.py:Net", "reward": "toy.py:redness", "prompt": '["a", "b"]',
        "method": "split", "temperature": 0.1, "particles": 3, "steps": 2, "out": "run", **options,
    }  # fmt: skip
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in settings.items() if v is not None]
    return main(["sample", *words, *flags])


def scores(folder):
    lines = (folder / "scores.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def told(capsys):
    return " ".join(capsys.readouterr().err.split())


@pytest.fixture
def lora(here):
    tuned = adapt(load_model("toy.py:Net"), rank=1)
    for p in tuned.adapters().values():
        p.data += 0.3
    save_adapters(tuned, here / "lora")
    return tuned


def height(folder):
    return Image.open(folder / "grid.png").size[1]


def test_the_unguided_twins_can_be_left_out(here, capsys):
    """The forecast and the grid follow."""
    assert run() == 0
    with_twins = told(capsys)
    assert run(unguided="false", out="bare") == 0
    without = told(capsys)
    nfe = json.loads((here / "run/metrics.json").read_text())["nfe_per_particle"]
    assert f"x 3 particles x {nfe + 2:g} NFE (2 of them unguided, to compare) = " in with_twins
    assert f"x 3 particles x {nfe:g} NFE = " in without
    assert "unguided" not in without
    assert height(here / "run") > 1.9 * height(here / "bare")
    reward = rewards.load("toy.py:redness")
    plain = steer.sample(load_model("toy.py:Net"), reward, ["a", "b"], 3, 2, "none")
    found = [line["beside"] for line in scores(here / "run")]
    assert [line["unguided"] for line in found] == pytest.approx(
        plain.rewards.flatten().tolist(), abs=1e-5
    )
    assert [line["beside"] for line in scores(here / "bare")] == [{}] * 6
    assert [line["reward"] for line in scores(here / "bare")] == [
        line["reward"] for line in scores(here / "run")
    ]


def test_none_has_no_twin(here, capsys):
    assert run(method="none", temperature=None) == 0
    assert "x 2 NFE = 12 network calls" in told(capsys)
    assert scores(here / "run")[0]["beside"] == {}


def test_adapters_stand_beside_the_base(here, lora, capsys):
    """Rows: base, tuned, guided; the scores say which."""
    assert run(lora="lora") == 0
    said = told(capsys)
    assert "(4 of them unguided, to compare)" in said
    reward, prompts = rewards.load("toy.py:redness"), ["a", "b"]
    for title, flow in (("base, unguided", lora.base), ("tuned, unguided", lora)):
        plain = steer.sample(flow, reward, prompts, 3, 2, "none").rewards
        found = [line["beside"][title] for line in scores(here / "run")]
        assert found == pytest.approx(plain.flatten().tolist(), abs=1e-5)
        assert f"{title} {float(plain.mean()):.4g}, " in said
    assert run(lora="lora", method="none", temperature=None, out="plain") == 0
    assert "base, unguided" in told(capsys)
    line = scores(here / "plain")[0]
    assert list(line["beside"]) == ["base, unguided"]
    assert line["reward"] != line["beside"]["base, unguided"]
    assert height(here / "run") > 1.4 * height(here / "plain")


def test_a_collapsed_population_is_said_and_kept(here, capsys):
    assert run(temperature=1e-3, particles=8, steps=4) == 0
    said = told(capsys)
    (kept,) = json.loads((here / "run/metrics.json").read_text())["warnings"]
    assert "of 8 " in kept
    assert f"warning: {kept}" in said
    assert run(temperature=100, particles=8, out="calm") == 0
    assert "warning" not in told(capsys)
    assert json.loads((here / "calm/metrics.json").read_text())["warnings"] == []


def test_a_kernel_of_one_s_own_draws_pictures(here, capsys):
    assert run(method="toy.py:Stirred", scale=1.5) == 0
    assert "toy.py:Stirred" in told(capsys)
    assert run(method="toy.py:Stirrd", out="other") == 2
    assert "did you mean Stirred" in told(capsys)


# ------------------------------------------------------------------ how far it is


class Clock:
    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now


def test_lines_now_and_then(monkeypatch):
    clock, page = Clock(), io.StringIO()
    monkeypatch.setattr(recipes.terminal, "time", clock)
    with progress(Console(file=page), "{task.percentage}") as lines:
        assert isinstance(lines, Lines)
        task = lines.add_task("split", total=40, note="")
        lines.update(task, completed=20)  # done before: not timed
        for _ in range(7):
            clock.now += 10
            lines.update(task, advance=1, note="reward 0.5")
    assert page.getvalue() == (
        "split: 23 of 40, reward 0.5; 30 s, 2 min 50 s left\n"
        "split: 26 of 40, reward 0.5; 1 min 0 s, 2 min 20 s left\n"
    )


def test_a_screen_has_a_bar():
    page = io.StringIO()
    with progress(Console(file=page, force_terminal=True, width=80), "{task.fields[note]}") as bar:
        bar.update(bar.add_task("[b]", total=2, note=""), advance=1, note="reward 0.5")
    assert "[b]" in page.getvalue()
    assert "reward 0.5" in page.getvalue()


def test_a_piped_run_says_how_far_it_is(here, monkeypatch, capsys):
    monkeypatch.setattr(recipes.terminal, "EVERY", 0.0)
    assert run(particles=40) == 0  # two groups
    said = capsys.readouterr().err
    assert "split: 1 of 4" in said
    assert "split: 4 of 4, reward " in said
    words = ["compare", "--model=toy.py:mixture", "--reward=toy.py:first", "--judge=null"]
    words += ['--methods=["none:steps=1,particles=2"]', "--seeds=2", "--out=compared"]
    assert main(words) == 0
    said = capsys.readouterr().err
    assert said.count("none, 1 step: 4 of 4; ") == 1
