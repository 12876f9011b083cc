"""A second time for pipelines that know one: nothing at equal times, any jump once trained."""

import json
from itertools import pairwise

import diffusers
import pytest
import safetensors.torch
import torch

import steer
from recipes.train_pipeline import caption_texts, train_pipeline
from steer.backends.second_time import FOLDER, SecondTime
from tests import tiny_pipelines as tiny
from tests.tiny_flows import FAMILIES, PROMPT, flow, pipe, seen_as

HAVE = ("sd15_flow", "sd3", "flux", "flux_schnell")
"""Families that take one here, with the width of their time's embedding."""
WIDTHS = {"sd15_flow": 32}


def term(name, scale=0.3, seed=0):
    """A term that does something, of a family's width."""
    network = flow(name).network
    module = network.get_submodule(flow(name).time_embedding)
    width = WIDTHS.get(name) or network.config.num_attention_heads * (
        network.config.attention_head_dim
    )
    assert module is not None
    torch.manual_seed(seed)
    made = SecondTime(flow(name).time_embedding, width, hidden=16, frequencies=4)
    torch.nn.init.normal_(made.out.weight, 0.0, scale)
    return made


def points(one, n=3):
    return torch.randn(n, *one.event_shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", HAVE)
def test_velocity_and_pipeline_are_what_they_were(name):
    """Bit for bit: the diagonal does not know the term, and a jump of no length is none."""
    base = flow(name).given([PROMPT])
    one = seen_as(pipe(name), name, second_time=term(name)).given([PROMPT])
    x = points(one)
    for t in (0.0, 0.3, 0.9):
        assert torch.equal(one.velocity(x, t), base.velocity(x, t))
        assert torch.equal(one.jump(x, t, t), x)
    assert (one.kind, one.evaluations) == ("two-time", 1)
    assert one.times(4) == [0.0, 0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("name", HAVE)
def test_before_training_a_jump_is_an_euler_step(name):
    fresh = term(name, 0.0)
    base = flow(name).given([PROMPT])
    one = seen_as(pipe(name), name, second_time=fresh).given([PROMPT])
    x = points(one)
    assert torch.equal(one.jump(x, 0.2, 0.7), base.jump(x, 0.2, 0.7))


@pytest.mark.parametrize("name", HAVE)
def test_the_end_of_a_jump_is_heard(name):
    """And the jump's derivative at its start is the velocity."""
    one = seen_as(pipe(name), name, second_time=term(name)).given([PROMPT])
    x, h = points(one), 1e-3
    pace = [(one.jump(x, 0.2, t) - x).detach() / (t - 0.2) for t in (0.3, 1.0)]
    assert float((pace[0] - pace[1]).abs().max()) > 1e-3
    rate = (one.jump(x, 0.2, 0.2 + h) - x) / h
    b = one.velocity(x, 0.2)
    assert float((rate - b).norm() / b.norm()) < 0.02
    low = torch.tensor([0.2, 0.5, 0.1])  # a time for each row
    rows = [one.jump(x[i : i + 1], float(low[i]), 0.9) for i in range(3)]
    torch.testing.assert_close(one.jump(x, low, 0.9), torch.cat(rows), rtol=1e-4, atol=1e-5)


def test_it_is_differentiable_and_right_under_checkpointing():
    made = term("sd3")
    x = points(flow("sd3"))

    def gradient(**options):
        one = seen_as(pipe("sd3"), "sd3", second_time=made, **options).given([PROMPT])
        y = x.clone().requires_grad_()
        return torch.autograd.grad(one.lookahead(y, 0.2).square().sum(), y)[0]

    torch.testing.assert_close(gradient(checkpointing=True), gradient(), rtol=1e-5, atol=1e-6)


def test_adapters_hear_it_too():
    """A copy of the denoiser has the term at its own embedding."""
    one = seen_as(pipe("sd3"), "sd3", second_time=term("sd3"))
    tuned = steer.finetune(one, lambda im: im.mean((1, 2, 3)), [PROMPT], steps=1, batch_size=2)
    x = points(one)
    base, plain = tuned.at(0.0).given([PROMPT]), one.given([PROMPT])
    assert torch.equal(base.jump(x, 0.1, 0.9), plain.jump(x, 0.1, 0.9))


def test_it_is_saved_beside_a_pipeline_and_found(tmp_path):
    saved = tiny.save("sd15_flow", tmp_path)
    made = term("sd15_flow")
    made.save(tmp_path)
    options = {"height": 16, "width": 16}
    one = steer.load(tmp_path, **options).given([PROMPT])
    x = points(one)
    wanted = seen_as(saved, "sd15_flow", second_time=made).given([PROMPT])
    torch.testing.assert_close(one.jump(x, 0.1, 0.9), wanted.jump(x, 0.1, 0.9))
    assert one.kind == "two-time"
    live = steer.load(saved, second_time=tmp_path, **options).given([PROMPT])
    torch.testing.assert_close(live.jump(x, 0.1, 0.9), wanted.jump(x, 0.1, 0.9))
    diffusers.DiffusionPipeline.from_pretrained(tmp_path)  # knows nothing of it


def test_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config.json is missing"):
        seen_as(pipe("sd3"), "sd3", second_time=tmp_path)
    term("sd3").save(tmp_path)
    config = tmp_path / FOLDER / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "format": "other"}))
    with pytest.raises(ValueError, match=r"not a second time in our format: format 'other'"):
        seen_as(pipe("sd3"), "sd3", second_time=tmp_path)
    term("sd3").save(tmp_path)
    weights = tmp_path / FOLDER / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"truncated or corrupt"):
        seen_as(pipe("sd3"), "sd3", second_time=tmp_path)
    with pytest.raises(ValueError, match="no module 'nowhere' that embeds the time"):
        seen_as(pipe("sd3"), "sd3", second_time=SecondTime("nowhere", 32))
    other = next(name for name in FAMILIES if flow(name).target_argument is not None)
    with pytest.raises(ValueError, match=r"knows two times by itself|made for another model"):
        seen_as(pipe(other), other, second_time=term("sd3"))


SMALL = {
    "autoencoder_steps": 4, "velocity_steps": 4, "map_steps": 4, "batch_size": 4,
    "vae_channels": [8, 8], "channels": [32, 32], "text_width": 32, "save_every": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    where = tmp_path_factory.mktemp("whole")
    train_pipeline(where, **SMALL)
    return where


def test_a_training_that_was_stopped_ends_as_one_that_was_not(whole, tmp_path, monkeypatch):
    """Killed in its second stage; batches drawn ahead by another process are the same ones."""
    from steer.training.module import FlowTraining

    steps, plain = [], FlowTraining.training_step

    def failing(self, batch, index):
        steps.append(self.global_step)
        if len(steps) == 3:
            raise RuntimeError("killed")
        return plain(self, batch, index)

    monkeypatch.setattr(FlowTraining, "training_step", failing)
    with pytest.raises(RuntimeError, match="killed"):
        train_pipeline(tmp_path / "cut", **SMALL)
    train_pipeline(tmp_path / "cut", **SMALL, workers=1)
    for stage in ("autoencoder", "velocity", "map"):
        one, two = (run / stage / "weights.safetensors" for run in (whole, tmp_path / "cut"))
        one, two = safetensors.torch.load_file(one), safetensors.torch.load_file(two)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one), stage
    with pytest.raises(ValueError, match="started with other settings"):
        train_pipeline(tmp_path / "cut", **{**SMALL, "guidance": 1.0})


def test_the_training_flow_is_the_pipeline(whole):
    """What is trained is what `steer.load` makes of the folder, up to float16's rounding."""
    one = steer.load(whole / "pipeline").given(["a fox", "a grinning face"])
    assert one.event_shape == (4, 16, 16)
    assert one.decode(points(one, 2)).shape == (2, 3, 32, 32)
    x = points(one, 2)
    pipe = one.pipe
    told = {"num_inference_steps": 3, "guidance_scale": 1.0, "output_type": "latent"}
    theirs = pipe(["a fox", "a grinning face"], latents=x.clone(), **told).images
    grid = one.source.grid(one, 3)
    y, along = x, one.along([0.0, *grid[1:]])
    for s, t in pairwise(grid):
        y = y + (t - s) * along.velocity(y, s)
    torch.testing.assert_close(y, theirs, rtol=1e-4, atol=1e-4)


def test_the_tokenizer_knows_the_captions():
    from recipes.emoji_pipeline import LENGTH, tokenizer

    tokens, again = tokenizer(caption_texts()), tokenizer(caption_texts())
    assert tokens.get_vocab() == again.get_vocab()  # else a resumed run reads other words
    text = "a glossy 3d smiling face with heart-eyes"
    assert tokens(text).input_ids == again(text).input_ids
    labels = ["fox", "blue apple", "smiling face with heart-eyes", "glossy 3d grinning face"]
    assert max(len(tokens(label).input_ids) for label in labels) <= LENGTH
    assert tokens.decode(tokens("a zebra's xylophone").input_ids, skip_special_tokens=True)
    assert len(tokens.tokenize("animal")) == 1
    assert len(tokens) <= 2048
