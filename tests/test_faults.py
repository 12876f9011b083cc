"""`steer sample` on rewards that fail: a fault ends the run with words, or is in metrics.json."""

import json

import pytest

from recipes.cli import main
from tests.test_compare import FLOW

REWARDS = '''

def some(images, prompts):
    """Not a number for dark pictures."""
    r = images.mean((1, 2, 3))
    return torch.where(r < r.mean(), torch.nan, r)


def none(images, prompts):
    """Not a number, whatever is seen."""
    return images.mean((1, 2, 3)) * torch.nan


def one(images, prompts):
    """A number for the brightest picture alone."""
    r = images.mean((1, 2, 3))
    return torch.where(r < r.max(), torch.nan, r)


def steep(images, prompts):
    """So steep that one particle has all the weight."""
    return 1000 * images.mean((1, 2, 3))
'''


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy.py").write_text(FLOW + REWARDS)
    return tmp_path


def run(reward, method="fk-difference", **options):
    settings = {
        "model": "toy.py:Net", "reward": f"toy.py:{reward}", "prompt": "a", "method": method,
        "temperature": 0.1, "particles": 16, "steps": 3, "out": "run", "unguided": "false",
        **options,
    }  # fmt: skip
    return main(["sample", *(f"--{k.replace('_', '-')}={v}" for k, v in settings.items())])


def metrics(folder):
    return json.loads((folder / "run/metrics.json").read_text())


def test_a_reward_that_is_not_a_number_stops_the_run_with_words(here, capsys):
    assert run("some") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "nan for prompt 0 ('a'), particle" in said
    assert "step 1 of 3" in said
    assert not (here / "run").exists()


def test_a_dropped_reward_is_counted_and_said(here):
    assert run("some", on_bad_reward="drop") == 0
    found = metrics(here)
    assert found["bad_rewards"] > 0
    said = f"{found['bad_rewards']:g} of {16 * found['reward_calls']:g} rewards were not finite"
    assert any(w.startswith(said) for w in found["warnings"])
    lines = (here / "run/scores.jsonl").read_text().splitlines()
    weights = [(line["reward"], line["log_w"]) for line in map(json.loads, lines)]
    assert all(log_w < -1e29 for reward, log_w in weights if reward is None)
    assert any(reward is not None for reward, _ in weights)


def test_no_weight_at_all_ends_the_run_with_words(here, capsys):
    assert run("none", on_bad_reward="drop") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "no particle of prompt 0 ('a') has a weight" in said
    assert not (here / "run").exists()


def test_one_survivor_is_said(here):
    assert run("one", on_bad_reward="drop", threshold=0) == 0
    found = metrics(here)
    assert found["ess"] == pytest.approx([1.0], abs=1e-3)
    assert any("on 1.0 of 16 particles" in w for w in found["warnings"])


def test_a_collapse_on_the_way_is_said_though_resampling_hides_it(here):
    assert run("steep") == 0
    found = metrics(here)
    assert min(ess for (ess,) in found["trace"]["weighed"]) < 2
    assert any("the weights collapsed to" in w for w in found["warnings"])


def test_a_sound_run_says_nothing(here):
    assert run("redness", temperature=10) == 0
    found = metrics(here)
    assert found["warnings"] == []
    assert "bad_rewards" not in found
    assert min(ess for (ess,) in found["trace"]["weighed"]) > 8
