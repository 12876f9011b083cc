"""What a reward is found to be before a run; a score that is not finite is said by its sample."""

import pytest
import torch

import steer
from rewards.combine.normalised import Normalised
from steer.reward import wrap
from steer.sampling.calibrate import learn, one_jump_scores, spread

PROMPTS = [f"prompt {i}" for i in range(3)]


def one_bad(value, at):
    """A reward that is `value` for the `at`-th sample that it is asked about."""
    seen = [0]

    def reward(x):
        scores = torch.tanh(x).sum(1)
        if 0 <= at - seen[0] < len(x):
            scores = scores.index_fill(0, torch.tensor([at - seen[0]]), value)
        seen[0] += len(x)
        return scores

    return wrap(reward)


def flow():
    return steer.GaussianMixture(torch.zeros(1, 2), 1.0)


def temperatures(flow, reward, prompts):
    steer.sample(flow, reward, prompts, 2, 2, "split", strength=2.0)


def scale(flow, reward, prompts):
    learn(flow, Normalised(reward), prompts)


WAYS = {
    "spread": (spread, 8),
    "one-jump scores": (one_jump_scores, 8),
    "normalised": (scale, 8),
    "temperature": (temperatures, 32),
    "finetune": (lambda f, r, p: steer.finetune(*tuned(r, p), steps=1, progress=False), 8),
}
"""Name -> what asks a reward about one-jump samples, and how many of a prompt."""


def tuned(reward, prompts):
    from steer.testing import Corrected

    return Corrected(flow(), width=8), reward, prompts


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("ask", "n"), WAYS.values(), ids=WAYS)
def test_one_score_that_is_not_finite_is_named(ask, n, value):
    """It was "the same for all samples": the deviation of a NaN is no number above zero."""
    words = rf"reward is {value} for prompt 1 \('prompt 1'\), particle 2, a one-jump sample"
    with pytest.raises(FloatingPointError, match=words):
        ask(flow(), one_bad(value, n + 2), PROMPTS)


def test_one_of_many_without_prompts():
    with pytest.raises(FloatingPointError, match="nan for prompt 0, particle 77, a one-jump"):
        spread(flow(), one_bad(float("nan"), 77), None)


def test_scores_that_are_the_same_are_said_to_be():
    with pytest.raises(ValueError, match="is the same, 1, for all one-jump samples"):
        spread(flow(), wrap(lambda x: x.new_ones(len(x))), PROMPTS)
