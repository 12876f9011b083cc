"""A reward in a plan: with the sizes of its weights, without fetching them."""

import importlib
from collections.abc import Callable
from typing import Any

from torch import Tensor

from steer.reward import Reward, wrap

__all__ = ["planned_reward"]


def planned_reward(reward: Reward | Callable[..., Tensor] | str | None, mode: Any) -> Reward:
    """Return the stand-in of a reward in a plan.

    Args:
        reward: a reward or a callable as it is; a text through `rewards.sizes`, which knows the
            sizes of the published ones; None: one without weights.
        mode: the mode of tensors without values.
    """
    if reward is None:
        return wrap(_brightness)
    if not isinstance(reward, str):
        return wrap(reward)
    made: Any = importlib.import_module("rewards.sizes").outlined(reward, mode)
    return made


def _brightness(images: Tensor) -> Tensor:
    return images.mean((1, 2, 3))
