"""What prints in a notebook: a few lines."""

import inspect

import pytest
import torch

import steer
from recipes.cli import main
from steer.adapters.inject import adapt
from steer.objectives.table import TABLE, described


def bright(images):
    return images.mean((1, 2, 3))


@pytest.fixture(scope="module")
def flow():
    return steer.load("emoji")


def test_a_result_is_a_few_lines(flow):
    result = steer.sample(flow, bright, ["fox", "cat"], 4, 2, "split", temperature=0.1, moves=0)
    lines = repr(result).splitlines()
    assert lines[0] == "Result of split, seed 0: 2 prompts x 4 particles"
    assert lines[1] == "  x (2, 4, 3, 32, 32), images (2, 4, 3, 32, 32)"
    mean, best = float(result.rewards.mean()), float(result.rewards.amax(1).mean())
    assert lines[2] == (
        f"  reward mean {mean:.4g}, best {best:.4g} a prompt, on average; nfe {result.nfe:g}"
    )
    low, high = (float(v) for v in (result.log_z.min(), result.log_z.max()))
    assert lines[3].startswith(f"  log_z {low:.4g} to {high:.4g}, ess ")
    assert len(lines) == 4
    assert len(repr(result)) < 400


def test_a_result_of_vectors_says_its_warnings():
    p = steer.GaussianMixture(torch.zeros(1, 2), 1.0)
    result = steer.sample(
        p, steer.LinearReward([1.0, 0.0]), None, 4, 2, "split", temperature=0.02, seed=1
    )
    mean, best = float(result.rewards.mean()), float(result.rewards.max())
    assert repr(result) == (
        "Result of split, seed 1: 4 particles\n  x (4, 2)\n"
        f"  reward mean {mean:.4g}, best {best:.4g};"
        f" nfe {result.nfe:g}\n  log_z {float(result.log_z):.4g}, ess {float(result.ess):.4g} of 4"
        f"\n  warning: {result.warnings[0]}"
    )
    plain = steer.sample(p, steer.LinearReward([1.0, 0.0]), None, 4, 2, "none")
    assert len(repr(plain).splitlines()) == 3


def test_a_tuned_flow_is_one_line(flow):
    tuned = adapt(flow, 4)
    assert repr(tuned) == (
        f"Adapted(emoji, rank 4, alpha 8, scale 1, {len(tuned.layers)} adapted layers)"
    )
    assert "scale 0.5" in repr(tuned.at(0.5).given(["fox"]))
    assert str(tuned) == repr(tuned)


# ------------------------------------------------------------------ options of objectives


@pytest.mark.parametrize("objective", TABLE)
def test_every_option_of_an_objective_is_described(objective):
    found = described(objective)
    assert list(found) == list(inspect.signature(TABLE[objective]).parameters)
    for name, (default, text) in found.items():
        assert len(text) > 8, name
        assert default is not inspect.Parameter.empty, name
        assert text.endswith("."), name


def test_an_unknown_objective_is_described_by_the_nearest_names():
    with pytest.raises(ValueError, match="unknown objective 'dirct': did you mean direct"):
        described("dirct")


def test_the_help_of_finetune_has_them(capsys):
    assert main(["finetune", "--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    for objective in TABLE:
        for name, (default, text) in described(objective).items():
            assert f"{name} (default {default}): {text}" in said
    assert said.index("what --options may hold") < said.index("examples:")
