"""The model `fashion`: its data, map, posterior map, reward and judge, and what they reach."""

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch

import rewards
import steer
from recipes.data.fashion import CLASSES, load
from recipes.defaults import own
from recipes.evaluate_classes import class_rate
from recipes.measure import draw
from recipes.sources import source_of
from rewards.judge import Judge


@pytest.fixture(scope="module")
def flow():
    return steer.load("fashion")


@pytest.fixture(scope="module")
def judge():
    return Judge(own("fashion").judge)


def test_the_data_are_balanced_parts():
    fashion = load()
    assert fashion.images.shape == (4000, 1, 28, 28)
    assert (len(fashion.train), len(fashion.test)) == (2000, 2000)
    for part in (fashion.train, fashion.test):
        assert fashion.classes[part].bincount().tolist() == [200] * 10
    assert float(fashion.images.min()) == 0
    assert float(fashion.images.max()) == 1


def test_published_files_are_read_and_missing_ones_named(tmp_path):
    for part, n in (("train", 3), ("t10k", 2)):
        pictures = bytes(16) + bytes(np.full((n, 28, 28), 255, np.uint8))
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(pictures))
        labels = bytes(8) + bytes(range(n))
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))
    fashion = load(tmp_path)
    assert fashion.images.shape == (5, 1, 28, 28)
    assert fashion.captions(fashion.train) == ["t-shirt", "trousers", "pullover"]
    assert source_of("fashion", folder=tmp_path).count == 3
    with pytest.raises(FileNotFoundError, match="apt-get install dataset-fashion-mnist"):
        load(tmp_path / "nowhere")


def test_pictures_are_shown_in_three_channels_and_read_back(flow):
    images = load().images[:2].expand(-1, 3, -1, -1)
    x = flow.encode(images)
    assert x.shape == (2, 1, 28, 28)
    torch.testing.assert_close(flow.decode(x), images)


def test_one_jump_shows_what_was_asked_for(flow, judge):
    classes = torch.arange(10).repeat(20)
    prompts = [CLASSES[k] for k in classes.tolist()]
    assert class_rate(judge, draw(flow, prompts, 1, 0), classes)["mean"] > 0.93
    assert class_rate(judge, draw(flow, prompts, 4, 0), classes)["mean"] > 0.93


def test_judge_and_reward_know_real_pictures(judge):
    fashion = load()
    images = fashion.images[fashion.test].expand(-1, 3, -1, -1)
    classes = fashion.classes[fashion.test]
    assert class_rate(judge, images, classes)["mean"] > 0.88
    reward = rewards.load("fashion")
    logits = reward.backbone.image_features(images)
    assert float((logits.argmax(1) == classes).float().mean()) > 0.88
    first = reward(images[:4], [CLASSES[k] for k in classes[:4].tolist()])
    torch.testing.assert_close(first, logits[:4].log_softmax(1).gather(1, classes[:4, None])[:, 0])
    with pytest.raises(ValueError, match="did you mean"):
        rewards.load("fashion:target=sneakers")


def test_the_posterior_map_draws_around_the_denoiser(flow):
    images = load().images[2000:2032].expand(-1, 3, -1, -1)
    x_1 = flow.encode(images)
    names = [CLASSES[k] for k in load().classes[2000:2032].tolist()]
    bound = flow.given(names)
    posterior = steer.load_posterior("fashion").given(names)
    for t in (0.25, 0.5, 0.75):
        g = torch.Generator().manual_seed(0)
        x = flow.path.interpolate(torch.randn(x_1.shape, generator=g), x_1, torch.tensor(t))
        y = posterior.sample(x, t, 16, g)
        assert y.shape == (16, 32, 1, 28, 28)
        spread = (y - y.mean(0)).square().mean().sqrt()
        assert float(spread) > 0.03  # it is no point
        miss = (y.mean(0) - bound.denoise(x, t)).square().mean().sqrt()
        assert float(miss) < float(spread)
    assert torch.equal(bound.posterior_map.sample(x, 1.0, 2, g)[0], x)


def test_a_model_s_posterior_map_guides_it(flow):
    reward = rewards.load("fashion:target=sneaker")
    options = {"particles": 8, "steps": 4, "seed": 1}
    plain = steer.sample(flow, reward, "", method="none", **options)
    guided = steer.sample(flow, reward, "", method="posterior", strength=3.0, **options)
    assert float(guided.rewards.mean()) > float(plain.rewards.mean())
    # at four states four draws of a call each, and four jumps; at t = 1 it is seen as it is
    assert guided.nfe == 4 * 4 + 4


def test_a_model_without_one_says_so():
    with pytest.raises(FileNotFoundError, match="no posterior map"):
        steer.load_posterior("emoji")
    with pytest.raises(ValueError, match="no model named"):
        steer.load_posterior("fashoin")


def test_sizes_are_within_the_budget():
    folders = [Path(steer.__file__).parent / "zoo" / "fashion"]
    folders += [Path(rewards.__file__).parent / "zoo" / n for n in ("fashion", "fashion-judge")]
    assert sum(f.stat().st_size for d in folders for f in d.rglob("*.safetensors")) < 6e6
