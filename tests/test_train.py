from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from steer.models.loading import load

TINY = {
    "channels": [8, 8, 8],
    "blocks": [1, 1, 1],
    "width": 16,
    "batch_size": 4,
    "velocity_steps": 5,
    "map_steps": 4,
    "save_every": 2,
    "sheet_every": 0,
    "precision": "32-true",
}


def _train(out, **changes):
    from recipes.train import train

    train(out, **{**TINY, **changes})


def _stop_at(monkeypatch, step):
    """Pull the plug while step `step` of either stage is computed."""
    from steer.training.module import FlowTraining

    whole = FlowTraining.training_step

    def training_step(self, batch, index):
        if self.global_step == step:
            raise RuntimeError("power cut")
        return whole(self, batch, index)

    monkeypatch.setattr(FlowTraining, "training_step", training_step)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    _train(out, sheet_every=100)
    return out


@pytest.mark.parametrize(("stage", "step"), [("velocity", 3), ("map", 3)])
def test_a_resumed_run_equals_one_that_never_stopped(whole, tmp_path, stage, step):
    with pytest.MonkeyPatch.context() as monkeypatch:
        if stage == "map":
            _train(tmp_path, stages=["velocity"])
        _stop_at(monkeypatch, step)
        with pytest.raises(RuntimeError, match="power cut"):
            _train(tmp_path)
    assert (tmp_path / stage / "last.ckpt").exists()
    assert not (tmp_path / stage / "model.safetensors").exists()
    _train(tmp_path)
    for name in ("velocity", "map"):
        file = f"{name}/model.safetensors"
        assert (tmp_path / file).read_bytes() == (whole / file).read_bytes()


@pytest.mark.parametrize("rule", ["lsd", "imf"])
def test_a_map_by_another_rule_is_taken_up_too(whole, tmp_path, rule):
    """With a weight that is learned, and derivatives of the network."""
    options = {"rule": rule, "weight": "learned", "derivative": "jvp"}
    for folder in ("a", "b"):
        (tmp_path / folder / "velocity").mkdir(parents=True)
        for name in ("config.json", "model.safetensors"):
            text = (whole / "velocity" / name).read_bytes()
            (tmp_path / folder / "velocity" / name).write_bytes(text)
    _train(tmp_path / "a", **options)
    with pytest.MonkeyPatch.context() as monkeypatch:
        _stop_at(monkeypatch, 3)
        with pytest.raises(RuntimeError, match="power cut"):
            _train(tmp_path / "b", **options)
    _train(tmp_path / "b", **options)
    files = [tmp_path / folder / "map" / "model.safetensors" for folder in "ab"]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert files[0].read_bytes() != (whole / "map" / "model.safetensors").read_bytes()


def test_the_scale_of_guidance_can_be_an_input(whole, tmp_path):
    (tmp_path / "velocity").mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "velocity" / name).write_bytes((whole / "velocity" / name).read_bytes())
    from recipes.cli import main

    words = ["--stages=[map]", "--guidance=[1, 4]", "--map-steps=3", "--rule=psd-m"]
    tiny = ["--channels=[8, 8, 8]", "--blocks=[1, 1, 1]", "--width=16", "--batch-size=4"]
    rest = ["--sheet-every=0", "--precision=32-true", f"--out={tmp_path}"]
    assert main(["train", *words, *tiny, *rest]) == 0
    flow = load(tmp_path / "map").given(["fox"])
    assert flow.takes_guidance
    assert flow.guided(4.0).jump(torch.randn(1, *flow.event_shape), 0.0, 1.0).isfinite().all()
    out = tmp_path / "drawn"
    drawn = ["sample", f"--model={tmp_path / 'map'}", "--prompt=fox", "--method=none", "--steps=1"]
    assert main([*drawn, "--reward=brightness", "--cfg=2", "--particles=1", f"--out={out}"]) == 0
    assert main([*drawn, "--reward=brightness", "--cfg=9", "--particles=1", f"--out={out}2"]) == 2


def test_a_run_leaves_a_model_that_loads_a_log_and_a_sheet(whole):
    flow = load(whole / "map")
    x = torch.randn(2, *flow.event_shape, generator=torch.Generator().manual_seed(0))
    assert flow.given(["red apple", "fox"]).jump(x, 0.0, 1.0).isfinite().all()
    assert list((whole / "map" / "sheets").glob("*.png"))
    assert list((whole / "velocity" / "log").rglob("metrics.csv"))
    torch.load(whole / "map" / "last.ckpt", weights_only=True)


def test_other_settings_in_the_same_folder_are_refused(whole):
    with pytest.raises(ValueError, match=r"started with other settings \(seed: 0 -> 1\)"):
        _train(whole, seed=1, sheet_every=100)


def test_the_configuration_file_names_arguments_that_exist():
    from inspect import signature

    from recipes.train import train

    file = Path(__file__).parents[1] / "recipes" / "configs" / "train_emoji.yaml"
    assert set(yaml.safe_load(file.read_text())) == set(signature(train).parameters)


def test_batches_are_functions_of_seed_and_step_and_never_cut_ink():
    from recipes.data.emoji import load as load_emoji
    from recipes.data.shifts import shifted
    from steer.training.data import Batches

    emoji = load_emoji()
    images = emoji.images[:40]
    draw = shifted(images, lambda i, g: (images[i], emoji.captions(i, g)), 2)
    batches = Batches(40, draw, 8, seed=3)
    x, prompts = batches(7)
    again, same = Batches(40, draw, 8, seed=3)(7)
    assert torch.equal(x, again)
    assert prompts == same
    assert prompts != Batches(40, draw, 8, seed=4)(7)[1]
    ink = (1 - images).sum((1, 2, 3)).sort().values
    seen = torch.cat([batches(k)[0] for k in range(5)])  # one epoch
    torch.testing.assert_close((1 - seen).sum((1, 2, 3)).sort().values, ink)


def test_empty_prompts_have_their_share():
    from steer.training.data import Batches

    white = torch.ones(10, 3, 4, 4)
    batches = Batches(10, lambda i, g: (white[i], "word"), 50, empty=0.12)
    prompts = [p for k in range(40) for p in batches(k)[1]]
    assert abs(prompts.count("") / len(prompts) - 0.12) < 0.03


def test_the_average_follows_slowly_but_for_the_start():
    from steer.training.average import follow

    old, new = [torch.zeros(3), torch.ones(2, 2)], [torch.ones(3), torch.zeros(2, 2)]
    follow(old, new, 0.9, 1)
    assert torch.allclose(old[0], torch.full((3,), 1 - 2 / 11))
    follow(old, new, 0.9, 1000)
    assert torch.allclose(old[1], torch.full((2, 2), 0.9 * 2 / 11))


def test_muon_steps_have_unit_singular_values_and_find_a_minimum():
    from steer.training.optim import MuonAdamW, muon_update

    g = torch.randn(16, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(muon_update(g, {}).flatten(1)) / (0.2 * 6)
    assert 0.6 < values.min() < values.max() < 1.3
    torch.manual_seed(0)
    layer, goal = nn.Linear(4, 4), nn.Linear(4, 4)
    x = torch.randn(64, 4)
    optimizer = MuonAdamW(layer.parameters(), 0.05, 0.05)
    for k in range(400):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * (1 - k / 400)
        optimizer.zero_grad()
        loss = (layer(x) - goal(x).detach()).square().mean()
        loss.backward()
        optimizer.step()
    assert loss < 1e-3
