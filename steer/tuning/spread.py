"""`steer.finetune`: tune the adapters of a flow map by a reward, in one call.

The recipe of a run: probe the temperature, put adapters on, run Lightning's loop with the
instruments on, and at the end draw the front of reward against drift by a sweep of the adapters'
scale. A run that stopped goes on from its last checkpoint when it is called again.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from steer.flow import FlowMap
from steer.reward import Reward, name_of
from steer.sampling.calibrate import one_jump_scores

if TYPE_CHECKING:
    pass

__all__ = ["spread"]


@torch.no_grad()
def spread(
    flow: FlowMap,
    reward: Reward,
    prompts: Sequence[str] | None,
    asked: Sequence[str] | None = None,
    seed: int = 0,
    *,
    most: int = 16,
) -> float:
    """Return the reward's standard deviation over one-jump samples of the same prompt.

    Root mean square over at most `most` prompts, 8 samples each; 128 samples without prompts.

    Raises:
        ValueError: the reward is the same for all samples.
    """
    values = one_jump_scores(flow, reward, prompts, asked, seed, most)
    deviation = float(values.var(1).mean().sqrt())
    if not deviation > 1e-8:
        raise ValueError(
            f"reward {name_of(reward)!r} is the same, {float(values[0, 0]):g}, for all one-jump "
            "samples of a prompt: it has no spread to set a temperature by, so give temperature, "
            "in the reward's units, or look at the reward"
        )
    return deviation
