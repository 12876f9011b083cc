"""CLIP similarity of picture and prompt, on open_clip's own models."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from rewards.models.cosine import Cosine
from rewards.models.towers import open_clip_backbone
from rewards.pixels.views import SHIFTS, shifted

__all__ = ["EMBEDDED", "Clip"]

EMBEDDED = Path(__file__).parents[1] / "zoo" / "clip"
"""The small CLIP of the package, in the layout of any open_clip checkpoint."""


class Clip(Cosine):
    """`cos(image features, text features)`, in [-1, 1] (Radford et al. 2021, arXiv 2103.00020).

    The preprocessing is tensor operations, so the gradient reaches the picture.

    With `views` above 1 it is the mean over views of the picture: itself, its mirror image, and
    shifts by a sixteenth of the side. With `noise`, fixed noise of that standard deviation is
    added to each. Adversarial patterns of this network are less robust to this, so the gradient
    depends more on the content of the picture.

    Known hack: adversarial high frequencies; check with a judge of another architecture.

    Args:
        model: a folder with open_clip_config.json and weights, `hf-hub:org/name`, or an open_clip
            architecture ("ViT-B-32"). Default: the small model of the package, trained on the
            emoji data.
        pretrained: the tag or file of an architecture's weights.
        template: the text around a prompt, with "{}" as its placeholder.
        views: number of views, 1 to 6.
        noise: standard deviation of the noise on each, in the units of [0, 1] pictures.
        dtype: dtype of the network: float32, bfloat16 or float16; None: as it is stored.
        compile: compile the tower of pictures.
        checkpoint: recompute the tower's blocks in the backward pass, for less memory.

    Raises:
        ValueError: views or noise out of range, or the model cannot be loaded; the
            message says what to download and where to put it.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        pretrained: str | None = None,
        template: str = "{}",
        views: int = 1,
        noise: float = 0.0,
        dtype: str | None = None,
        compile: bool = False,
        checkpoint: bool = False,
    ) -> None:
        if not isinstance(views, int) or not 1 <= views <= 2 + len(SHIFTS):
            raise ValueError(
                f"views must be a whole number in 1 to {2 + len(SHIFTS)}, got {views}"
            )
        if not noise >= 0:
            raise ValueError(f"noise must not be negative, got {noise}")
        name = str(EMBEDDED if model is None else model)
        backbone = open_clip_backbone(
            name, pretrained, dtype=dtype, compile=compile, checkpoint=checkpoint
        )
        super().__init__(backbone, template)
        self.views, self.noise = views, float(noise)

    def similarity(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the cosine of each image with its own prompt, the mean over views, (n,)."""
        texts = self.text_features(prompts)
        seen = [self.image_features(x) for x in shifted(images, self.views, self.noise)]
        return (torch.stack(seen) * texts).sum(-1).mean(0)
