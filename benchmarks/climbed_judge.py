"""The judge of emoji as a reward with a gradient: how far the judge itself can guide.

A judge must never be optimised. Only as an upper bound, this shows what a perfect reward would
reach with the same network calls:

    steer compare --reward benchmarks/climbed_judge.py:ClimbedJudge --methods '[...]'
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from rewards.judge import Judge
from steer.reward.base import clamp01

__all__ = ["ClimbedJudge"]


class ClimbedJudge(Judge):
    """The judge's cosine of picture and prompt, with its gradient."""

    differentiable = True

    def forward(
        self,
        images: Tensor,
        prompts: Sequence[str] | None = None,
        metadata: Sequence[Any] | None = None,
    ) -> Tensor:
        """Score images (n, 3, h, w) in [0, 1] with one prompt each -> (n,) in [-1, 1]."""
        assert prompts is not None
        texts = self.network.encode_text(list(prompts))
        x = clamp01(images)
        if x.shape[-2:] != (32, 32):
            x = F.interpolate(x, (32, 32), mode="bilinear", antialias=True)
        return (self.network.encode_image(x) * texts).sum(-1)
