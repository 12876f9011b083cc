"""A preview picture of a tuned flow: the same noise before and after, with rewards."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from steer.adapters.lora import Adapted
from steer.flow import device_of
from steer.pictures import captioned_grid, side_of
from steer.reward import Reward

__all__ = ["Preview"]

PROMPTS = 4
"""Number of prompts: two network calls each."""


@dataclass(frozen=True)
class Preview:
    """The samples of a tuned flow that a notebook shows.

    It keeps a reference to the reward; `tuned.preview = None` releases it.

    Attributes:
        reward: the reward that it was tuned for.
        prompts: the prompts that it was tuned on; None for a flow without prompts.
        asked: the reward's prompt for each of them.
        seed: seed of the noise.
    """

    reward: Reward
    prompts: Sequence[str] | None
    asked: Sequence[str] | None
    seed: int = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> "Preview":
        return self  # the reward is not copied with the flow

    @torch.no_grad()
    def __call__(self, tuned: Adapted) -> Image.Image | None:
        """Return one-jump pictures of base and tuned flow; None for a flow without pictures."""
        prompts = None if self.prompts is None else list(self.prompts)[:PROMPTS]
        asked = prompts if self.asked is None else list(self.asked)[:PROMPTS]
        flows = [tuned.at(0.0), tuned]
        if prompts is not None:
            flows = [flow.given(prompts) for flow in flows]
        count = PROMPTS if prompts is None else len(prompts)
        noise = torch.Generator().manual_seed(self.seed)
        x = torch.randn(count, *flows[0].event_shape, generator=noise).to(device_of(tuned))
        rows = []
        for title, flow in zip(("base", f"tuned, scale {tuned.scale:g}"), flows, strict=True):
            images = flow.decode(flow.lookahead(x, 0.0))
            if images.ndim != 4 or images.shape[1] != 3:
                return None
            scores = self.reward(images, asked).tolist()
            names = prompts or [""] * count
            captions = [f"{s:.3g} {n}" for s, n in zip(scores, names, strict=True)]
            rows.append((title, images, captions))
        return captioned_grid(rows, side_of(rows[0][1]))
