"""Shared by the objectives without a reward gradient, which compare samples of a prompt.

Rows of one prompt form a group, and a sample's advantage is its reward minus the group's mean.
`NFT` contrasts good and bad samples in the forward process; `GRPO` follows the likelihood ratio of
a stochastic composition of jumps. The penalty of both is in the units of `R`, so the temperature
has the same meaning as for the other objectives.
"""

import torch
from torch import Tensor

__all__ = ["advantages", "whole_group"]


def advantages(value: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Return `A = (R - mean of its group) / sigma`, (n,), and sigma, ().

    `sigma² = Σ (R - mean)² / (n - n/group)` is pooled over the groups: with four rows per prompt,
    the standard deviation of a single group would be noisy, and a group whose rewards hardly
    differ would get large advantages. It is at least 1e-5 of the largest |R|, so that rounding
    errors do not count as an advantage.

    Args:
        value: R of the rows, prompt-major, (n,).
        group: rows of each prompt.

    Raises:
        ValueError: a group of one.
    """
    if group < 2:
        raise ValueError(
            "a group of 1 row has no advantage, because its mean is its own reward: give the "
            "batch at least 2 rows of each prompt (fewer prompts at a time, or a larger batch)"
        )
    rows = value.reshape(-1, group)
    centred = rows - rows.mean(1, keepdim=True)
    sigma = (centred.square().sum() / (len(value) - len(rows))).sqrt()
    sigma = torch.maximum(sigma, 1e-5 * value.abs().max() + 1e-12)
    return (centred / sigma).flatten(), sigma


def whole_group(group: int) -> int:
    """Return the number of rows of a prompt, if there are enough to compare.

    Raises:
        ValueError: fewer than two.
    """
    if group < 2:
        raise ValueError(
            f"group must be at least 2, got {group}: a sample is compared with others of its "
            "prompt; 4 to 8 do well"
        )
    return group
