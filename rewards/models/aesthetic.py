"""Aesthetic score of a picture, by LAION's heads on OpenAI's CLIP."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from rewards.models.hub import File, Source, fetch_url, state
from rewards.models.towers import open_clip_backbone
from rewards.models.weights import collapsed
from steer.reward import Reward, unknown

__all__ = ["HEADS", "NEEDS", "Aesthetic", "Head"]


@dataclass(frozen=True)
class Head(File):
    """A published head.

    Attributes:
        model: the CLIP that it was trained on.
    """

    model: str = ""


_LAION = "https://github.com/LAION-AI/aesthetic-predictor/raw/main/sa_0_4_vit_"
_IMPROVED = "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/"
_L14 = "hf-hub:timm/vit_large_patch14_clip_224.openai"
HEADS: Mapping[str, Head] = {
    "v2": Head(f"{_IMPROVED}sac%2Blogos%2Bava1-l14-linearMSE.pth", "see its page", "4 MB", _L14),
    "v1-l14": Head(f"{_LAION}l_14_linear.pth", "MIT", "4 kB", _L14),
    "v1-b32": Head(
        f"{_LAION}b_32_linear.pth", "MIT", "3 kB", "hf-hub:timm/vit_base_patch32_clip_224.openai"
    ),
    "v1-b16": Head(
        f"{_LAION}b_16_linear.pth", "MIT", "3 kB", "hf-hub:timm/vit_base_patch16_clip_224.openai"
    ),
}
"""Name -> head: the improved predictor of 2022 (v2), and the first ones, by the CLIP they read."""


NEEDS = (
    HEADS["v2"],
    Source(
        _L14.removeprefix("hf-hub:"),
        ("open_clip_config.json", "open_clip_model.safetensors"),
        size="1.7 GB",
    ),
)
"""What the default options need and the package does not contain."""


class Aesthetic(Reward):
    """`w . f + b` of the image's unit features f, a score of about 1 to 10; needs no prompt.

    Schuhmann et al. 2022, arXiv 2210.08402, section 3.2 (LAION-Aesthetics). Both kinds of heads
    are read: one linear layer (`weight` (1, d), `bias` (1,)), and the chain of linear layers
    without a nonlinearity (`layers.0.weight`, `layers.0.bias`, `layers.2.weight`, ...), which is
    an affine map and is collapsed to one.

    Known hack: pictures drift to glowing, painterly, centred portraits and landscapes, and to
    adversarial noise; the prompt is ignored. Add a reward that uses the prompt.

    Args:
        head: one of `HEADS`, or a file, .pth or .safetensors.
        model: the CLIP under it: what `clip:model=` takes. Default: the one that the head was
            trained on; OpenAI's ViT-L/14 for a file.
        pretrained: the tag or file of an architecture's weights.
        dtype: dtype of the network: float32, bfloat16 or float16; None: as it is stored.
        compile: compile the tower of pictures.
        checkpoint: recompute the tower's blocks in the backward pass, for less memory.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unknown head, one of another layout or width, or weights that cannot be
            loaded; the message says what to download and where to put it.
    """

    def __init__(
        self,
        head: str | Path = "v2",
        model: str | Path | None = None,
        pretrained: str | None = None,
        dtype: str | None = None,
        compile: bool = False,
        checkpoint: bool = False,
    ) -> None:
        super().__init__()
        name = str(head)
        published = HEADS.get(name)
        if published is None and not Path(name).is_file():
            if Path(name).suffix or "/" in name:
                raise FileNotFoundError(
                    f"no file {name!r}: aesthetic:head= takes a .pth or .safetensors file, or one "
                    f"of {', '.join(HEADS)}"
                )
            raise unknown("head", name, HEADS)
        file = Path(name) if published is None else fetch_url(published.url, "aesthetic", "head")
        weight, bias = _affine(state(file, "aesthetic", "head"), file)
        default = _L14 if published is None else published.model
        self.backbone = open_clip_backbone(
            str(default if model is None else model),
            pretrained,
            reward="aesthetic",
            dtype=dtype,
            compile=compile,
            checkpoint=checkpoint,
        )
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.weight: Tensor
        self.bias: Tensor
        kinds = {type(module).__name__ for module in self.backbone.tower.modules()}
        if published is not None and "QuickGELU" not in kinds:
            raise ValueError(
                f"the head {name!r} was trained on OpenAI's CLIP, whose activation is QuickGELU, "
                f"and {str(model)!r} has another: say {default}, or an architecture whose name "
                "ends in -quickgelu, with pretrained=openai"
            )
        width = _width(self.backbone.model)
        if width is not None and width != len(weight):
            raise ValueError(
                f"the head {name!r} reads {len(weight)} features, and the CLIP gives {width}: "
                "give the one that it was trained on, aesthetic:model="
            )

    def forward(
        self,
        images: Tensor,
        prompts: Sequence[str] | None = None,
        metadata: Sequence[Any] | None = None,
    ) -> Tensor:
        """Score images (n, 3, h, w) in [0, 1] -> (n,)."""
        features = self.backbone.image_features(images)
        scores = features @ self.weight.to(features) + self.bias.to(features)
        return scores.to(images.device)


def _width(model: Any) -> int | None:
    """Return the number of features of an open_clip model, if its configuration has it."""
    return getattr(model.visual, "output_dim", None)


def _affine(weights: Mapping[str, Tensor], file: Path) -> tuple[Tensor, Tensor]:
    """Read (w (d,), b ()) from a head's file."""
    if set(weights) == {"weight", "bias"}:
        weight, bias = weights["weight"], weights["bias"]
    elif any(re.fullmatch(r"layers\.\d+\.weight", key) for key in weights):
        weight, bias = collapsed(weights, "layers.")
    else:
        raise ValueError(
            f"{str(file)!r} is not a head of an aesthetic predictor (its first keys are "
            f"{', '.join(list(weights)[:3]) or 'none'}): it must hold weight (1, d) and bias "
            "(1,), or layers.0.weight, layers.0.bias, layers.2.weight and so on"
        )
    if weight.ndim != 2 or len(weight) != 1 or bias.numel() != 1:
        raise ValueError(
            f"the head in {str(file)!r} gives weight {tuple(weight.shape)} and bias "
            f"{tuple(bias.shape)}: it must have one output, weight (1, d) and bias (1,)"
        )
    return weight[0].float(), bias.reshape(()).float()
