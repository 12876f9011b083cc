"""The judge: an eye of another kind, held out from all guidance."""

import pytest
import torch

import rewards
import steer
from recipes.contrastive import ascend, augment, contrast, picture_words, retrieval
from recipes.data.emoji import load
from rewards.judge import EMBEDDED, Judge
from rewards.testing import RewardContract


class TestJudge(RewardContract):
    tolerance = 1e-4

    def create_reward(self):
        return Judge()

    def prompts(self):
        return ["red apple", "a cat", "food", "flat fox", "green frog"]


def test_judge_knows_the_real_pictures():
    emoji, judge = load(), Judge()
    labels = emoji.labels
    assert retrieval(judge.similarity, emoji.images[::3], labels[::3], labels) > 0.85
    one = judge(emoji.images[:4], labels[:4])
    assert torch.allclose(one, judge.similarity(emoji.images[:4], labels[:4]).diagonal())


def test_no_guidance_by_the_judge():
    assert "judge" not in rewards.NAMES
    assert not Judge.differentiable
    flow = steer.GaussianMixture(torch.zeros(1, 2), 1.0)
    with pytest.raises(ValueError, match="not differentiable"):
        steer.sample(flow, Judge(), "a cat", method="fmtt")


def test_features_are_rows():
    features = Judge().features(torch.rand(3, 3, 48, 48, generator=torch.Generator()))
    assert features.ndim == 2
    assert len(features) == 3


def test_truncated_or_missing_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        Judge(tmp_path)
    (tmp_path / "config.json").write_text((EMBEDDED / "config.json").read_text())
    whole = (EMBEDDED / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 3])
    with pytest.raises(ValueError, match="is incomplete"):
        Judge(tmp_path)


def test_captions_true_of_another_picture_are_no_negatives():
    """Hand-made: caption 1 is true of picture 0 too, so it leaves row 0's denominator."""
    s = torch.tensor([[1.0, 2.0], [0.5, 3.0]])
    truth = torch.tensor([[True, True], [False, True]])
    rows = -torch.tensor([0.0, (3.0 - torch.tensor([0.5, 3.0]).logsumexp(0)).item()]).mean()
    columns = -torch.tensor([(1 - torch.tensor([1.0, 0.5]).logsumexp(0)).item(), 0.0]).mean()
    assert float(contrast(s, truth)) == pytest.approx(float(rows + columns) / 2, abs=1e-6)


def test_words_of_a_picture_hold_its_captions():
    emoji = load()
    words = picture_words(emoji)
    g = torch.Generator().manual_seed(0)
    for i in range(0, len(emoji), 37):
        assert set(emoji.captions(i, g).split()) <= words[i]


def test_augment_is_seeded_and_stays_in_range():
    images = load().images[:8]
    draw = [
        augment(images, torch.Generator().manual_seed(s), crop=0.2, noise=0.2, colour=0.2, erase=1)
        for s in (0, 0, 1)
    ]
    assert torch.equal(draw[0], draw[1])
    assert not torch.equal(draw[0], draw[2])
    assert 0 <= float(draw[0].min()) <= float(draw[0].max()) <= 1


def test_ascend_takes_steps_of_the_length_and_stays_in_range():
    grey = torch.full((2, 3, 8, 8), 0.5)
    climbed = ascend(rewards.load("brightness"), grey, ["", ""], steps=2, length=0.3)
    assert torch.allclose((climbed - grey).flatten(1).norm(dim=1), torch.tensor(0.6))
    white = ascend(rewards.load("brightness"), grey, ["", ""], steps=2, length=1e3)
    assert float(white.max()) == 1


def test_training_resumes_exactly(tmp_path, monkeypatch):
    """A power cut in step 3 of 4, and the same weights as without."""
    from recipes.contrastive import ContrastiveTraining, Pairs
    from recipes.train import fit
    from rewards.judge import JudgeNetwork

    emoji = load()

    def module():
        torch.manual_seed(0)
        network = JudgeNetwork([8, 8], [1, 1], 64, 8)

        def change(images, g):
            return augment(images, g, crop=0.1, noise=0.1, colour=0.1)

        pairs = Pairs(emoji, emoji.train, 6, 3, change)
        encoders = network.encode_image, network.encode_text
        return ContrastiveTraining(network, *encoders, network.log_scale, pairs, steps=4)

    def weights(m):
        return torch.cat([p.detach().flatten() for p in m.network.parameters()])

    whole, cut, resumed = module(), module(), module()
    start = weights(whole)
    fit(whole, tmp_path / "whole", 2)
    step = ContrastiveTraining.training_step

    def stop(self, batch, index):
        if self.global_step == 3:
            raise RuntimeError("power cut")
        return step(self, batch, index)

    with monkeypatch.context() as m:
        m.setattr(ContrastiveTraining, "training_step", stop)
        with pytest.raises(RuntimeError, match="power cut"):
            fit(cut, tmp_path / "parts", 2)
    fit(resumed, tmp_path / "parts", 2)
    assert torch.equal(weights(whole), weights(resumed))
    assert not torch.equal(weights(whole), start)
