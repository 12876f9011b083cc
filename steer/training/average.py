"""The running average of a run's weights, a second policy that objectives call in each step."""

from collections.abc import Iterable

from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

__all__ = ["follow"]


def follow(average: Iterable[Tensor], weights: Iterable[Tensor], decay: float, step: int) -> None:
    """Update a running average with the weights after step k: `a <- d a + (1 - d) w`.

    `d = min(decay, (1 + k) / (10 + k))`, so that the initial weights are forgotten quickly.
    Lightning's `EMAWeightAveraging` cannot be used, since it deep-copies the whole module and
    hides the copy, and objectives call the average in each step.

    Args:
        average: tensors that are updated in place.
        weights: weights in the same order.
        decay: final value of d, in [0, 1).
        step: k, the number of optimizer steps taken.
    """
    short = min(decay, (1 + step) / (10 + step))
    get_ema_multi_avg_fn(short)(list(average), list(weights), step)
