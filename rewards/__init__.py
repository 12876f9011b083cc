"""Rewards for steering: load one by name, wrap a function, add them up.

>>> reward = load("0.7*brightness - 0.3*colour:name=red")
>>> reward.differentiable
True

Nothing heavy is imported before a reward that needs it is made.
"""

from rewards.loading import FUNCTIONS, NAMES, load
from steer.reward import Reward, wrap

__all__ = ["FUNCTIONS", "NAMES", "Reward", "load", "wrap"]
