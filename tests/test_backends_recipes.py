"""Pipelines on the command line and in the programs, live and by folder."""

import json

import pytest
import torch
import yaml

import steer
from recipes.cli import main
from steer.adapters.store import save_adapters
from steer.identity import file_hash
from tests import tiny_pipelines as tiny
from tests.test_backends_lora import trained
from tests.tiny_flows import flow, pipe, seen_as


def red(images):
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("pipelines") / "flux"
    tiny.save("flux", where)
    return where


def options(name):
    call = dict(tiny.CALLS[name])
    size = {"height": call.pop("height"), "width": call.pop("width")}
    return f"--model-options={json.dumps({**size, 'call': call})}"


def test_a_pipeline_is_sampled_by_its_folder(folder, tmp_path, capsys):
    words = ["sample", f"--model={folder}", options("flux"), "--reward=contrast", "--prompt=a fox"]
    words += ["--method=fmrg-j", "--steps=2", "--particles=2", f"--out={tmp_path / 'out'}"]
    assert main(words) == 0, capsys.readouterr().err
    scores = (tmp_path / "out" / "scores.jsonl").read_text().splitlines()
    assert len(scores) >= 2
    assert (tmp_path / "out" / "grid.png").is_file()
    config = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert "model_options" in json.dumps(config)


def test_guidance_is_the_pipelines_own(tmp_path, capsys):
    """`--cfg` mixes as the pipeline does, also under adapters."""
    tiny.save("sd3", tmp_path / "sd3")
    save_adapters(trained(flow("sd3")), tmp_path / "lora")
    words = ["sample", f"--model={tmp_path / 'sd3'}", options("sd3"), "--reward=contrast"]
    words += ["--prompt=a fox", "--method=none", "--steps=2", "--particles=1", "--cfg=3"]
    words += ["--negative-prompt=blue"]
    base = [*words, f"--out={tmp_path / 'base'}"]
    assert main(base) == 0, capsys.readouterr().err
    got = tmp_path / "base" / "scores.jsonl"
    lora = [*words, f"--lora={tmp_path / 'lora'}", f"--out={tmp_path / 'with'}"]
    assert main(lora) == 0, capsys.readouterr().err
    assert got.read_text() != (tmp_path / "with" / "scores.jsonl").read_text()


def test_a_live_pipeline_is_compared(tmp_path):
    made = seen_as(pipe("flux"), "flux")
    out = steer.compare(
        made, "contrast", prompts=["a fox"], seeds=2, out=tmp_path / "c",
        methods=["none:steps=1", "fmrg-j:steps=2,particles=2"],
    )  # fmt: skip
    table = (out / "table.md").read_text()
    assert "fmrg-j" in table
    assert "none" in table


def test_a_live_pipeline_by_itself_is_compared(tmp_path):
    """As a user holds it, at the pipeline's own size."""
    out = steer.compare(
        pipe("sana_sprint"), "contrast", prompts=["a fox"], seeds=1, out=tmp_path / "c",
        methods=["none:steps=1"], model_options={"height": 32, "width": 32},
    )  # fmt: skip
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert config["model"] == "a live SanaSprintPipeline"


def test_adapters_are_evaluated_on_a_live_pipeline(tmp_path):
    base = flow("flux")
    save_adapters(trained(base), tmp_path / "lora")
    out = steer.evaluate(
        base, tmp_path / "lora", reward="contrast", prompts=["a fox", "a cat"], particles=2,
        steps=[1], lora_scale=[1.0], guidance=["best-of-n:steps=1,particles=2"],
        out=tmp_path / "e",
    )  # fmt: skip
    assert "lora" in (out / "table.md").read_text()


def test_a_rewards_text_is_taken_in_python():
    result = steer.sample(flow("flux"), "contrast", prompts=["a fox"], method="none", steps=1)
    assert torch.isfinite(result.rewards).all()


def test_large_files_are_not_hashed_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("steer.identity.WHOLE", 1 << 10)
    monkeypatch.setattr("steer.identity.BLOCK", 1 << 4)
    file = tmp_path / "weights"
    data = bytearray(range(256)) * 1024
    file.write_bytes(data)
    before = file_hash(file)
    data[-1] ^= 1
    file.write_bytes(data)
    assert file_hash(file) != before
    file.write_bytes(data + b"\0")
    assert file_hash(file) != before
