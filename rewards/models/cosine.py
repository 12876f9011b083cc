"""The cosine of a picture's and a prompt's features, as most picture-text models compute it."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from rewards.models.backbone import Backbone
from rewards.models.prompts import one_each
from steer.reward import Reward, name_of

__all__ = ["Cosine"]


class Cosine(Reward):
    """`scale cos(image features, text features) + bias` on a backbone.

    Attributes:
        scale: 1 unless a subclass says otherwise.
        bias: 0 unless a subclass says otherwise.
    """

    scale = 1.0
    bias = 0.0

    def __init__(self, backbone: Backbone, template: str = "{}") -> None:
        super().__init__()
        if template.count("{}") != 1:
            raise ValueError(
                f"template {template!r} must hold '{{}}' once: it stands for the prompt"
            )
        self.backbone, self.template = backbone, template

    def image_features(self, images: Tensor) -> Tensor:
        """Embed images (n, 3, h, w) in [0, 1] -> unit vectors (n, d)."""
        return self.backbone.image_features(images)

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """Embed prompts, each in the template -> unit vectors (n, d)."""
        return self.backbone.text_features([self.template.replace("{}", p) for p in prompts])

    def similarity(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the cosine of each image with its own prompt, (n,)."""
        return (self.image_features(images) * self.text_features(prompts)).sum(-1)

    def forward(
        self,
        images: Tensor,
        prompts: Sequence[str] | None = None,
        metadata: Sequence[Any] | None = None,
    ) -> Tensor:
        """Score images (n, 3, h, w) in [0, 1] with one prompt each -> (n,).

        Raises:
            ValueError: no prompts, or not one for each image.
        """
        prompts = one_each(images, prompts, f"the reward {name_of(self).lower()!r}")
        scores = self.scale * self.similarity(images, prompts) + self.bias
        return scores.to(images.device)
