"""Adapters that are tuned further: the run begins, and compares, with them on."""

import json

import pytest
import torch

import steer
from recipes.cli import main
from steer.adapters.attach import attach, has_adapters, parted
from steer.adapters.inject import adapt
from steer.adapters.store import load_adapters, save_adapters
from steer.models.loading import save
from tests.test_tuning import PROMPTS, QUICK, redness, tiny


@pytest.fixture
def style():
    """A flow with adapters that do something, at scale .5."""
    tuned = adapt(tiny(), rank=3, alpha=5)
    with torch.no_grad():
        for i, p in enumerate(tuned.adapters().values()):
            p.copy_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    return tuned.at(0.5)


def looked(flow, prompt="red cat"):
    x = torch.randn(2, *flow.event_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return flow.given([prompt]).jump(x, 0.0, 1.0)


def test_adapters_come_off_and_go_on_again(style):
    plain, layers = parted(style)
    assert has_adapters(style)
    assert not has_adapters(plain)
    torch.testing.assert_close(looked(plain), looked(style.base))
    torch.testing.assert_close(looked(attach(plain, layers)), looked(style), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(looked(plain), looked(style), atol=1e-3)


def test_adapters_that_are_off_are_none_to_tune(style):
    with pytest.raises(ValueError, match="all of them are disabled"):
        parted(style.at(0.0))


def test_a_run_begins_with_them_and_moves_on(style, tmp_path):
    before = {n: p.clone() for n, p in style.adapters().items()}
    settings = {**QUICK, "learning_rate": 5e-2, "batch_size": 16, "sweep": [0.0, 1.0]}
    tuned = steer.finetune(
        style, redness, PROMPTS, steps=8, temperature=0.1, out=tmp_path / "on",
        **settings,
    )  # fmt: skip
    assert all(torch.equal(p, before[n]) for n, p in style.adapters().items())
    torch.testing.assert_close(looked(tuned.base), looked(style), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(looked(tuned.at(0.0)), looked(style.base), rtol=1e-5, atol=1e-6)
    gain = [redness(torch.cat([looked(f, p) for p in PROMPTS])).mean() for f in (style, tuned)]
    assert gain[1] > gain[0] + 0.05
    again = load_adapters(tiny(), tmp_path / "on")
    torch.testing.assert_close(looked(again), looked(tuned), rtol=1e-5, atol=1e-6)


def test_the_front_reads_the_run_without_any_adapters_too(style, tmp_path):
    steer.finetune(
        style, redness, PROMPTS, steps=1, temperature=1.0, out=tmp_path / "x",
        **{**QUICK, "sweep": [0.0, 1.0], "check_every": 1},
    )  # fmt: skip
    front = json.loads((tmp_path / "x" / "front.json").read_text())
    off, on = (e for e in front if e["steps"] == 1)
    assert abs(on["reward"] - on["reward/base"]) < abs(off["reward"] - off["reward/base"])


def test_the_start_is_part_of_the_run(style, tmp_path):
    call = {"steps": 2, "temperature": 1.0, "out": tmp_path / "run", "sweep": [], **QUICK}
    steer.finetune(style, redness, PROMPTS, **call)
    with pytest.raises(FileExistsError, match="start"):
        steer.finetune(style.at(0.25), redness, PROMPTS, **call)
    with pytest.raises(FileExistsError, match="start"):
        steer.finetune(tiny(), redness, PROMPTS, **call)


def test_a_run_that_goes_on_compares_with_where_it_began(style, tmp_path):
    call = {"temperature": 1.0, "sweep": [], **QUICK, "learning_rate": 1e-2}
    steer.finetune(style, redness, PROMPTS, steps=2, out=tmp_path / "run", **call)
    longer = steer.finetune(style, redness, PROMPTS, steps=4, out=tmp_path / "run", **call)
    torch.testing.assert_close(looked(longer.base), looked(style), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(looked(longer), looked(style), atol=1e-4)


def test_targets_are_for_new_adapters(style):
    with pytest.raises(ValueError, match="leave targets out"):
        steer.finetune(style, redness, PROMPTS, steps=1, targets=["conv1"], temperature=1.0)


def test_on_the_command_line(style, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save(tiny(), "model")
    save_adapters(style, "style")
    words = ["finetune", "--model=model", "--lora=style", "--lora-scale=0.5", "--reward=contrast"]
    words += ["--prompts=[cat]", "--judge=null", "--steps=1", "--out=on", "--temperature=1"]
    more = [f"--{k.replace('_', '-')}={str(v).lower()}" for k, v in QUICK.items()]
    assert main([*words, *more, "--sweep=[]"]) == 0, capsys.readouterr().err
    tuned = load_adapters(steer.load("model"), "on")
    assert next(iter(tuned.configs.values())).r == 3
