"""What a tuning run says and leaves: its front and what it costs, its figures, its summary."""

import json
import shlex
from types import SimpleNamespace

import pytest
import torch

import steer
from rewards.combine.normalised import Normalised
from rewards.pixels.tone import Contrast
from steer.adapters.inject import adapt
from steer.adapters.lora import Adapted
from steer.adapters.store import read_metadata
from steer.objectives.direct import Direct
from steer.pictures import captioned_grid
from steer.reward import score, wrap
from steer.training.progress import Lines, progress
from steer.tuning.counts import Metered, TuningCounts
from steer.tuning.ending import summary
from steer.tuning.front import SCALES, STEPS, plan_sweep
from steer.tuning.panel import Panel
from steer.tuning.prompts import Prompts
from steer.tuning.request import Tuning
from steer.tuning.settings import Settings
from tests.test_tuning import CHECKED, PROMPTS, QUICK, readings, redness, tiny, tune


@pytest.fixture(scope="module")
def flow():
    return tiny()


@pytest.fixture
def calls(monkeypatch):
    """The rows of every network call of adapted flows."""
    rows = []
    for name in ("velocity", "jump"):
        plain = getattr(Adapted, name)
        monkeypatch.setattr(
            Adapted, name, lambda self, x, *t, f=plain: rows.append(len(x)) or f(self, x, *t)
        )
    return rows


# ------------------------------------------------------------------ the front


@pytest.mark.parametrize("prompts", [["cat", "owl", "fox"], None])
def test_a_sweep_costs_what_the_panel_says(flow, calls, prompts):
    panel = Panel(adapt(flow, 2), prompts, 3, wrap(redness))
    for scales, steps in (([0.0, 0.5, 1.0], [2, 4]), ([0.5], [1, 2]), ([0.0], [8]), ([1.0], [])):
        expected = panel.cost(scales, steps)
        calls.clear()
        for k in steps:
            for scale in scales:
                panel.read(scale, k, drift=k == min(steps))
        assert sum(calls) == expected


def test_a_sweep_costs_a_tenth_of_the_run_unless_it_is_asked_for(flow):
    panel = Panel(adapt(flow, 2), ["cat", "owl"], 4, wrap(redness))
    full = panel.cost(SCALES, STEPS)
    assert plan_sweep(panel, Settings(), 10 * full) == ([*SCALES], [*STEPS], "")
    _, steps, line = plan_sweep(panel, Settings(), 10 * panel.cost(SCALES, STEPS[:2]))
    assert steps == [1, 2]
    assert "swept at 1 and 2 jumps" in line
    assert "sweep_steps=[1, 2, 4, 8]" in line
    _, steps, line = plan_sweep(panel, Settings(), 100)
    assert steps == []
    assert "swept at no jumps" in line
    for asked in ({"sweep": [1.0]}, {"sweep_steps": [3, 9]}):
        scales, steps, line = plan_sweep(panel, Settings(**asked), 1)
        assert scales == asked.get("sweep", [*SCALES])
        assert steps == asked.get("sweep_steps", [*STEPS])
        assert not line
    assert plan_sweep(panel, Settings(sweep=[]), 1e9)[1] == []


def test_a_short_run_has_figures_and_no_front(flow, tmp_path, capsys):
    checks = {k: v for k, v in CHECKED.items() if k != "sweep"}
    tune(flow, tmp_path / "short", 2, **QUICK | checks)
    assert not (tmp_path / "short" / "front.json").exists()
    assert "swept at no jumps" in capsys.readouterr().out
    last = readings(tmp_path / "short")[-1]
    known = read_metadata(tmp_path / "short")
    assert known["figures"]["reward"] == {"base": last["reward/base"], "tuned": last["reward"]}
    assert "scale" not in known
    tune(flow, tmp_path / "asked", 2, **QUICK | checks | {"sweep": [0.5], "sweep_steps": [1]})
    front = json.loads((tmp_path / "asked" / "front.json").read_text())
    assert [(e["scale"], e["steps"]) for e in front] == [(0.5, 1)]
    assert read_metadata(tmp_path / "asked")["scale"] == 0.5


# ------------------------------------------------------------------ one scale


def test_base_and_tuned_are_scored_on_todays_scale(flow, tmp_path):
    """A learned scale moves during the run; each reading is the true gain over today's spread."""
    reward = Normalised(wrap(redness, clamp=False), decay=0.5)
    images = []

    def judge(x):
        images.append(x.clone())  # the base's pictures first, then those of each check
        return redness(x)

    tuned = tune(
        flow, tmp_path / "run", 30, reward=reward, judge=wrap(judge, clamp=False),
        options={"jumps": [1]},
        **QUICK | CHECKED | {"early_stop": 0, "check_every": 15, "learning_rate": 3e-2},
    )  # fmt: skip
    base, *_, last = images
    assert not reward.training
    entry = readings(tmp_path / "run")[-1]
    mean, std = float(reward.mean), float(reward.std)
    for name, pictures in (("reward/base", base), ("reward", last)):
        assert entry[name] == pytest.approx(float((redness(pictures).mean() - mean) / std))
    gain = float((redness(last) - redness(base)).mean())
    assert gain > 0.02
    assert entry["reward/change"] == pytest.approx(gain / std, rel=1e-3)
    card = read_metadata(tmp_path / "run")["figures"]["reward"]
    assert card["tuned"] > card["base"]
    before = readings(tmp_path / "run")[0]
    assert before["reward/base"] != pytest.approx(entry["reward/base"], abs=0.1)  # it did move
    assert before["reward/change"] == 0
    assert tuned.adapters()


def test_a_held_out_reward_that_falls_raises_its_alarm_on_a_learned_scale(flow):
    """Scored on the first scale the reward would seem to fall, and mute the alarm."""
    reward = Normalised(wrap(redness, clamp=False))
    reward.statistics = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    panel = Panel(
        adapt(flow, 2),
        ["cat", "owl"],
        16,
        reward.eval(),
        held_out={"other": wrap(spoilt, clamp=False)},
    )  # fmt: skip
    panel.instruments()
    tuned = panel.base[1].clone()
    tuned[:, 0] += 0.5
    panel.draw = lambda *_: tuned
    reward.statistics = torch.tensor([2.0, 5.0, 26.0], dtype=torch.float64)  # the run went on
    reading, alarms, _ = panel.read()
    assert reading.values["reward"].change == pytest.approx(0.5, abs=1e-5)
    assert "held_out/other" in {alarm.name for alarm in alarms}


def spoilt(images):
    return -redness(images)


# ------------------------------------------------------------------ what is said


def asked(flow, **changes):
    known = {"prompts": Prompts(PROMPTS), "reward": wrap(redness), **changes}
    return Tuning(
        flow, known["reward"], known["prompts"], Direct(), 40, 0.1, None, None, {}, 0, Settings()
    )


def test_the_summary_says_what_came_of_it_and_what_next(flow, tmp_path):
    said = {
        "scale": 0.75, "figures": {"reward": {"base": 0.6, "tuned": 0.71}, "kid": {"base": 0.0}},
    }  # fmt: skip
    (tmp_path / "best").mkdir()
    named = tiny()
    named.name = "my models/tiny"
    reward = wrap(redness)
    reward.__name__ = "colour:name=red"
    lines = summary(asked(named, reward=reward), said, 33, tmp_path)
    assert lines[0] == (
        "tuned for 33 of 40 steps: reward 0.6 -> 0.71 at scale 0.75, which is recommended"
    )
    assert lines[1] == f"{tmp_path} holds the adapters; beside them best"
    words = shlex.split(lines[2].removeprefix("next: "))
    assert words[:2] == ["steer", "sample"]
    options = dict(zip(words[2::2], words[3::2], strict=True))
    assert options == {
        "--model": "my models/tiny", "--lora": str(tmp_path), "--lora-scale": "0.75",
        "--method": "none", "--reward": "colour:name=red", "--prompt": "cat",
    }  # fmt: skip
    plain = summary(asked(flow), {}, 40, tmp_path)
    assert plain[0] == "tuned for 40 of 40 steps"
    assert "steer.sample(tuned.at(1), reward, prompts" in plain[2]
    assert len(summary(asked(flow), {}, 40)) == 1


def test_a_run_ends_with_its_summary(flow, tmp_path, capsys):
    tune(flow, tmp_path / "run", 2, **QUICK | CHECKED)
    lines = capsys.readouterr().out.splitlines()
    entry = readings(tmp_path / "run")[-1]
    assert lines[-3].startswith(f"tuned for 2 of 2 steps: reward {entry['reward/base']:.4g} -> ")
    assert "best, sheets, grid.png, README.md" in lines[-2]
    assert lines[-1].startswith("next: ")


def test_a_pipe_is_told_now_and_then(flow, capsys, monkeypatch):
    clock = iter(range(0, 10_000, 20))  # each step takes 20 s
    ticking = SimpleNamespace(perf_counter=lambda: next(clock))
    monkeypatch.setattr("steer.training.progress.time", ticking)
    assert isinstance(progress(), Lines)  # pytest reads what is written
    tune(flow, steps=9, **QUICK | {"progress": True, "micro_batch": 2})
    lines = [ln for ln in capsys.readouterr().out.splitlines() if ln.startswith("step ")]
    assert lines[-1].startswith("step 9 of 9, reward ")
    assert lines[-1].endswith("0 s left")
    assert [int(line.split()[1]) for line in lines] == [2, 4, 6, 8, 9]
    assert lines[0].endswith("40 s, 2 min 20 s left")


def test_sheets_fit_a_screen(flow):
    panel = Panel(adapt(flow, 2), [*PROMPTS[:4], *PROMPTS[-1:], *PROMPTS], 6, wrap(redness))
    panel.instruments()
    rows = panel.sheet(panel.base[1], 1)
    assert len(rows) == 6
    assert all(len(images) == len(captions) == 8 for _, images, captions in rows)
    title, images, captions = rows[1]
    assert title == "'red fox': base, then tuned"
    assert torch.equal(images[:4], panel.base[1][6:10])
    assert captions[0] == f"{float(score(wrap(redness), images[:1])):.3g}"
    width, height = captioned_grid(rows).size
    assert width <= 1280
    assert height <= 850


# ------------------------------------------------------------------ what is counted


def test_a_metered_flow_is_the_flow(flow):
    """Score, log-density, denoiser, decode and encode are those of the flow inside."""
    exact = steer.GaussianMixture(torch.zeros(1, 2), 0.5)
    exact.checkpoint = False
    counts = TuningCounts()
    metered = Metered(exact, counts)
    x, t = torch.randn(4, 2, generator=torch.Generator().manual_seed(0)), 0.3
    for name in ("velocity", "denoise", "score", "log_prob"):
        assert torch.equal(getattr(metered, name)(x, t), getattr(exact, name)(x, t))
    assert counts.forward == 12  # log_prob asks no network
    tuned = adapt(flow, 2)
    bound = Metered(tuned, counts).given(["cat"])
    picture = torch.rand(1, 3, 8, 8)
    assert torch.equal(bound.encode(bound.decode(picture)), tuned.encode(tuned.decode(picture)))
    assert bound.counts is counts


def test_terms_of_a_learned_sum_keep_their_scales_after_the_run(flow):
    reward = Normalised(wrap(redness, clamp=False)) + 0.5 * Normalised(Contrast())
    tune(flow, steps=2, reward=reward)
    held = [part.statistics.clone() for part in reward.rewards]
    reward(torch.rand(4, 3, 8, 8))
    for part, before in zip(reward.rewards, held, strict=True):
        part.update()
        assert torch.equal(part.statistics, before)
