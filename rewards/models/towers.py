"""Backbones with an image tower and a text tower: those of open_clip and transformers."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rewards.models.backbone import Backbone
from rewards.models.hub import Source, fetch, home
from rewards.models.instances import once, stamp
from rewards.models.preprocess import Preprocess
from rewards.trust import may_fetch, refuse_fetch

__all__ = ["OpenClip", "Transformers", "open_clip_backbone"]


class OpenClip(Backbone):
    """An open_clip model: features are unit vectors.

    Args:
        model: an open_clip model.
        tokenizer: its tokenizer.
        preprocess: default: as the model's configuration says.
        **execution: see `Backbone`.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Callable[[list[str]], Tensor],
        preprocess: Preprocess | None = None,
        **execution: Any,
    ) -> None:
        super().__init__(model, preprocess or Preprocess.of_open_clip(model), **execution)
        self.tokenizer = tokenizer

    @property
    def tower(self) -> nn.Module:
        """The part of the model that sees pictures."""
        return self.model.visual  # type: ignore[return-value]

    def encode_image(self, x: Tensor) -> Tensor:
        """Encode preprocessed pictures -> unit vectors (n, d)."""
        return F.normalize(self.model.encode_image(x), dim=-1)  # type: ignore[operator]

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Encode texts -> unit vectors (n, d)."""
        tokens = self.tokenizer(list(texts)).to(self.device, non_blocking=True)
        return F.normalize(self.model.encode_text(tokens), dim=-1)  # type: ignore[operator]


class Transformers(Backbone):
    """A two-tower model of transformers (CLIP, SigLIP): features are unit vectors.

    Args:
        model: a model with `get_image_features` and `get_text_features`.
        tokenizer: texts -> the arguments of `get_text_features`.
        preprocess: from pictures in [0, 1] to `pixel_values`.
        **execution: see `Backbone`.

    Attributes:
        scale: the factor of the cosine that the model was trained with, `exp(logit_scale)`.
        bias: the bias that it was trained with.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Callable[[list[str]], dict[str, Tensor]],
        preprocess: Preprocess,
        **execution: Any,
    ) -> None:
        # read before the weights are converted to another dtype
        scale, bias = (getattr(model, name, None) for name in ("logit_scale", "logit_bias"))
        super().__init__(model, preprocess, **execution)
        self.tokenizer = tokenizer
        self.scale = 1.0 if scale is None else _number(scale, torch.exp)
        self.bias = 0.0 if bias is None else _number(bias)

    @property
    def tower(self) -> nn.Module:
        """The part of the model that sees pictures."""
        return self.model.vision_model  # type: ignore[return-value]

    def encode_image(self, x: Tensor) -> Tensor:
        """Encode preprocessed pictures -> unit vectors (n, d)."""
        out = self.model.get_image_features(pixel_values=x)  # type: ignore[operator]
        # an object since transformers 5, before that a tensor
        return F.normalize(getattr(out, "pooler_output", out), dim=-1)

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Encode texts -> unit vectors (n, d)."""
        inputs = self.tokenizer(list(texts))
        tokens = {k: v.to(self.device, non_blocking=True) for k, v in inputs.items()}
        out = self.model.get_text_features(**tokens)  # type: ignore[operator]
        return F.normalize(getattr(out, "pooler_output", out), dim=-1)


def _number(x: Tensor, f: Callable[[Tensor], Tensor] = torch.clone) -> float:
    return float(f(x.detach().double()))


def open_clip_backbone(
    name: str, pretrained: str | None = None, *, reward: str = "clip", **execution: Any
) -> OpenClip:
    """Return an open_clip model, loaded once per name, weights and execution.

    Args:
        name: a folder with open_clip_config.json and weights, `hf-hub:org/name`, or an
            architecture of `open_clip.list_models()`.
        pretrained: the tag or file of an architecture's weights.
        reward: the reward's name, for the message.
        **execution: see `Backbone`.

    Raises:
        ValueError: it cannot be loaded; the message says what to download and where to put it.
    """
    files = [Path(text) for text in (name, pretrained) if text and Path(text).exists()]
    key = ("open_clip", name, pretrained, *map(stamp, files), *sorted(execution.items()))

    def make() -> OpenClip:
        import open_clip

        found, hub = name, None
        if Path(name).is_dir():
            found = f"local-dir:{name}"
        elif name.startswith("hf-hub:"):
            repo = name.removeprefix("hf-hub:")
            hub = Source(repo, ("open_clip_config.json", "open_clip_model.safetensors"))
            if (home() / repo / hub.files[0]).is_file():
                found = f"local-dir:{home() / repo}"
            elif not may_fetch():
                found = f"local-dir:{fetch(hub, reward)}"  # in the hub's cache, or an error
        elif not (pretrained and Path(pretrained).is_file()):
            refuse_fetch(reward, f"{name} {pretrained or ''}".strip())
        try:
            model = open_clip.create_model(found, pretrained=pretrained, require_pretrained=True)
            tokenizer = open_clip.get_tokenizer(found)
        except Exception as error:
            if hub is not None:
                fetch(hub, reward)  # if files are missing, it says which and where to put them
            raise ValueError(
                f"cannot load the CLIP {name!r}: {error}. Give a folder that holds "
                "open_clip_config.json and open_clip_model.safetensors (download both from the "
                "model's page if its hub cannot be reached from here), hf-hub:org/name, or a name "
                "of open_clip.list_models() with pretrained=TAG or pretrained=FILE"
            ) from error
        return OpenClip(model, tokenizer, **execution)

    return once(key, make)
