"""Encoders of pictures and texts on which rewards are built, with one interface."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rewards.models.cut import warn_of_cut
from rewards.models.preprocess import Preprocess
from steer.reward import shared, unknown

__all__ = ["DTYPES", "Backbone", "checkpointed", "recomputed"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Values of the `dtype` option of a reward."""

TEXTS = 4096
"""Number of prompts whose features a backbone caches."""


class Backbone(nn.Module):
    """A frozen encoder with its preprocessing: pictures in [0, 1] -> features.

    It runs in evaluation mode and in its own dtype, regardless of autocast. Pictures are moved to
    its device, and features are returned in float32 (or float64).

    Args:
        model: the network; its weights are frozen.
        preprocess: from pictures in [0, 1] to its input.
        dtype: dtype of its weights: one of `DTYPES`, or None to keep theirs.
        compile: compile the image tower (`torch.compile`): worthwhile on a GPU for many calls with
            the same batch size.
        checkpoint: recompute the tower's blocks in the backward pass: this needs the memory of one
            block instead of the whole tower, and one more forward call.

    Raises:
        ValueError: an unknown dtype.
    """

    texts = TEXTS
    """Number of prompts whose features are cached."""

    tokenizer: Callable[[list[str]], Any] | None = None
    """The tokenizer, if there is one: texts -> ids (n, length), or an object that holds them."""

    def __init__(
        self,
        model: nn.Module,
        preprocess: Preprocess,
        *,
        dtype: str | None = None,
        compile: bool = False,
        checkpoint: bool = False,
    ) -> None:
        super().__init__()
        if dtype is not None and dtype not in DTYPES:
            raise unknown("dtype", str(dtype), DTYPES)
        self.model = model.requires_grad_(False).eval()
        if dtype is not None:
            self.model.to(DTYPES[dtype])
        self.preprocess = preprocess
        if checkpoint:
            checkpointed(self.tower)
        if compile:
            self.tower.compile()
        self._texts: dict[str, Tensor] = {}
        self._looked_at: dict[str, None] = {}

    @property
    def tower(self) -> nn.Module:
        """The part of the model that encodes pictures."""
        return self.model

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the model's weights."""
        return next(self.model.parameters()).dtype

    @abstractmethod
    def encode_image(self, x: Tensor) -> Tensor:
        """Encode preprocessed pictures (n, 3, *size) in the model's dtype -> (n, d)."""

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Encode texts -> (n, d)."""
        raise NotImplementedError(f"{type(self).__name__} reads no texts")

    def image_features(self, images: Tensor) -> Tensor:
        """Encode images (n, 3, h, w) in [0, 1] -> (n, d), float32 or wider.

        Within `steer.reward.sharing`, pictures that were encoded already are not encoded again.
        """
        return shared(self, images, lambda: self._image_features(images))

    def _image_features(self, images: Tensor) -> Tensor:
        with torch.autocast(self.device.type, enabled=False):
            x = self.preprocess(images.to(self.device)).to(self.dtype)
            features = self.encode_image(x)
        return features.to(torch.promote_types(features.dtype, torch.float32))

    @torch.no_grad()
    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Encode texts -> (n, d), float32 or wider; each text once."""
        known = self._texts
        new = [text for text in dict.fromkeys(texts) if text not in known]
        if new:
            self.tell_cut(new)
            with torch.autocast(self.device.type, enabled=False):
                features = self.encode_text(new)
            features = features.to(torch.promote_types(features.dtype, torch.float32))
            known = known | dict(zip(new, features, strict=True))
            self._texts = dict(list(known.items())[-self.texts :])
        rows = torch.stack([known[text] for text in texts])  # kept on the device
        return rows.to(torch.promote_types(self.dtype, torch.float32))

    def tell_cut(self, texts: Sequence[str]) -> None:
        """Warn about texts that exceed the encoder's length, once for each text."""
        new = [text for text in dict.fromkeys(texts) if text not in self._looked_at]
        if new and self.tokenizer is not None:
            known = self._looked_at | dict.fromkeys(new)
            self._looked_at = dict(list(known.items())[-self.texts :])
            warn_of_cut(new, self.tokenizer)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Backbone":
        self._texts = {}  # they may have another dtype now
        return super()._apply(fn, recurse)

    def train(self, mode: bool = True) -> "Backbone":
        """Stay in evaluation mode: a reward is never trained."""
        return super().train(False)


def checkpointed(tower: nn.Module) -> None:
    """Return the tower with its blocks recomputed in the backward pass, also in evaluation mode.

    Raises:
        ValueError: it has no list of blocks.
    """
    lists = [m for m in tower.modules() if isinstance(m, nn.ModuleList) and len(m) > 1]
    if not lists:
        raise ValueError(
            f"{type(tower).__name__} has no list of blocks to recompute: leave checkpoint out"
        )
    recomputed(max(lists, key=lambda m: sum(p.numel() for p in m.parameters())))


def recomputed(blocks: Iterable[nn.Module]) -> None:
    """Recompute each block in the backward pass instead of keeping its activations."""
    from torch.utils.checkpoint import checkpoint

    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore
