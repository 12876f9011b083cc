"""Similarity to a given picture, by features that were learned without labels."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rewards.models.backbone import Backbone
from rewards.models.hub import Source, folder_of
from rewards.models.instances import once, stamp
from rewards.models.preprocess import Preprocess
from rewards.models.weights import refuse_lacking
from rewards.pixels.reading import read
from steer.reward import Reward, reason, unknown

__all__ = ["NEEDS", "POOLS", "SOURCE", "Dino", "Tokens"]

SOURCE = Source(
    "facebook/dinov2-small",
    ("config.json", "model.safetensors", "preprocessor_config.json"),
    licence="Apache-2.0",
    size="88 MB",
)
"""The weights of the default model."""

POOLS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "cls": lambda tokens, extra: tokens[:, 0],
    "mean": lambda tokens, extra: tokens[:, extra:].mean(1),
}
"""Tokens (n, extra + patches, d), `extra` of them not of patches -> one vector per picture."""


NEEDS = (SOURCE,)
"""What the default options need and the package does not contain."""


class Dino(Reward):
    """`cos(f(image), f(reference))` of self-supervised features, in [-1, 1].

    f is the CLS token, or the mean of the patches' tokens, after the last norm of a vision
    transformer: DINOv2 (Oquab et al. 2023, arXiv 2304.07193), DINO (Caron et al. 2021, arXiv
    2104.14294), DINOv3 (Siméoni et al. 2025, arXiv 2508.10104). The CLS token represents the
    content; the patches also the appearance.

    Known hack: adversarial textures; place and colour have little influence, so a picture with
    another layout scores high.

    Args:
        image: the reference, a picture file; transparent parts are placed on white.
        model: a folder that transformers saved, or a hub id. Default: facebook/dinov2-small.
        pool: how the tokens of a picture are pooled: cls or mean.
        dtype: dtype of the network: float32, bfloat16 or float16; None: as it is stored.
        compile: compile the network.
        checkpoint: recompute its blocks in the backward pass, for less memory.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: another pool, a folder of another kind of model, or a model that cannot be
            loaded: the message says what to download and where to put it.
    """

    def __init__(
        self,
        image: str | Path,
        model: str | Path | None = None,
        pool: str = "cls",
        dtype: str | None = None,
        compile: bool = False,
        checkpoint: bool = False,
    ) -> None:
        super().__init__()
        if pool not in POOLS:
            raise unknown("pool", str(pool), POOLS)
        self.pool = pool
        self.register_buffer("reference", read(image, "image"))
        self.reference: Tensor
        self.backbone = _tokens(model, dtype=dtype, compile=compile, checkpoint=checkpoint)
        self._known: tuple[Any, Tensor] | None = None

    def features(self, images: Tensor) -> Tensor:
        """Embed images (n, 3, h, w) in [0, 1] -> unit vectors (n, d)."""
        tokens = self.backbone.image_features(images)
        return F.normalize(POOLS[self.pool](tokens, self.backbone.extra), dim=-1)

    def forward(
        self,
        images: Tensor,
        prompts: Sequence[str] | None = None,
        metadata: Sequence[Any] | None = None,
    ) -> Tensor:
        """Return the cosine of each image (n, 3, h, w) in [0, 1] with the reference, (n,)."""
        where = self.backbone.device, self.backbone.dtype
        if self._known is None or self._known[0] != where:
            with torch.no_grad():
                self._known = where, self.features(self.reference)
        return (self.features(images) * self._known[1]).sum(-1).to(images.device)


class Tokens(Backbone):
    """A vision transformer of transformers; its features are all tokens (n, tokens, d).

    Args:
        model: a model that returns `last_hidden_state`.
        preprocess: from pictures in [0, 1] to `pixel_values`.
        **execution: see `Backbone`.

    Attributes:
        extra: number of tokens before those of the patches: CLS and registers.
    """

    def __init__(self, model: nn.Module, preprocess: Preprocess, **execution: Any) -> None:
        super().__init__(model, preprocess, **execution)
        self.extra = 1 + (getattr(model.config, "num_register_tokens", 0) or 0)

    def encode_image(self, x: Tensor) -> Tensor:
        """Return the tokens of preprocessed pictures after the last norm, (n, tokens, d)."""
        return self.model(pixel_values=x).last_hidden_state


def _tokens(model: str | Path | None, **execution: Any) -> Tokens:
    """Return the model, once per folder and execution."""
    folder = folder_of(model, SOURCE, "dino")

    def make() -> Tokens:
        from transformers import AutoImageProcessor, AutoModel

        try:
            network, info = AutoModel.from_pretrained(
                folder, local_files_only=True, output_loading_info=True
            )
            processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
            preprocess = Preprocess.of_processor(processor)
        except Exception as error:
            raise ValueError(
                f"cannot load the vision transformer in {str(folder)!r}: {reason(error)}. It must "
                f"hold {', '.join(SOURCE.files)}, as {SOURCE.page} does"
            ) from error
        # DINO's own files have no pooler, and none is used here
        lacking = (key for key in info["missing_keys"] if not key.startswith("pooler."))
        refuse_lacking(lacking, network, folder)
        if getattr(network.config, "patch_size", None) is None:
            raise ValueError(
                f"{type(network).__name__} in {str(folder)!r} is not a vision transformer: "
                f"dino:model= takes DINO, DINOv2 or DINOv3, as {SOURCE.repo}"
            )
        return Tokens(network, preprocess, **execution)

    return once(("dino", *stamp(folder), *sorted(execution.items())), make)
