"""Rewards: modules that give one number per sample, where higher is better.

>>> import torch
>>> darkness = wrap(lambda images: -images.mean((1, 2, 3)))
>>> (0.5 * darkness + 2 * darkness)(torch.ones(2, 3, 4, 4))
tensor([-2.5000, -2.5000])

Everything in this library that a reward needs can be imported from here.
"""

from steer.names import hint, moved, reason, unknown
from steer.reward.base import Reward, WeightedSum, clamp01, name_of, score
from steer.reward.closed import LinearReward, QuadraticReward
from steer.reward.door import Rest, at_rest, check_scores, plain, refuse_inference
from steer.reward.sharing import shared, sharing
from steer.reward.terms import dissect, learners, leaves, term_gradients, term_scores
from steer.reward.wrapping import wrap

__all__ = [
    "LinearReward",
    "QuadraticReward",
    "Rest",
    "Reward",
    "WeightedSum",
    "at_rest",
    "check_scores",
    "clamp01",
    "dissect",
    "hint",
    "learners",
    "leaves",
    "moved",
    "name_of",
    "plain",
    "reason",
    "refuse_inference",
    "score",
    "shared",
    "sharing",
    "term_gradients",
    "term_scores",
    "unknown",
    "wrap",
]
