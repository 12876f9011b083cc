"""CLIP similarity of picture and prompt, on open_clip's own models."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rewards.prompts import one_each
from steer.reward import Reward, clamp01

__all__ = ["EMBEDDED", "Clip"]

SHIFTS = ((1, 1), (-1, -1), (1, -1), (-1, 1))
"""Of the third view and the next, in sixteenths of the height and the width."""

EMBEDDED = Path(__file__).with_name("zoo") / "clip"
"""The small CLIP that comes along, in the layout of any open_clip checkpoint."""


class Clip(Reward):
    """`cos(image features, text features)`, in [-1, 1] (Radford et al. 2021, arXiv 2103.00020).

    The preprocessing is tensor operations, so the gradient reaches the picture: resize with
    antialiasing to the model's size, then normalise with the model's own mean and deviation.

    With `views` above 1 it is the mean over views of the picture: itself, its mirror image, and
    shifts by a sixteenth of the side; with `noise`, fixed noise of that deviation lies on each.
    What only this network reads survives less of that, so the gradient shows the drawing more.

    Known hack: high frequencies that only this network reads; check with a judge of another kind.

    Args:
        model: a folder with open_clip_config.json and weights, `hf-hub:org/name`, or an
            open_clip architecture ("ViT-B-32"). Default: the small model that comes along,
            trained on the emoji data.
        pretrained: the tag or file of an architecture's weights.
        template: what a prompt is put into, "{}" standing for it.
        views: how many views are averaged, 1 to 6.
        noise: standard deviation of the noise on each, in the units of [0, 1] pictures.

    Raises:
        ValueError: views or noise out of range, or the model cannot be had; the message says
            what to download and where to.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        pretrained: str | None = None,
        template: str = "{}",
        views: int = 1,
        noise: float = 0.0,
    ) -> None:
        super().__init__()
        if not isinstance(views, int) or not 1 <= views <= 2 + len(SHIFTS):
            raise ValueError(
                f"views must be a whole number in 1 to {2 + len(SHIFTS)}, got {views}"
            )
        if not noise >= 0:
            raise ValueError(f"noise must not be negative, got {noise}")
        self.views, self.noise = views, float(noise)
        import open_clip

        name = str(EMBEDDED if model is None else model)
        if Path(name).is_dir():
            name = f"local-dir:{name}"
        try:
            self.model = open_clip.create_model(
                name, pretrained=pretrained, require_pretrained=True
            )
            self.tokenizer = open_clip.get_tokenizer(name)
        except Exception as error:
            raise ValueError(
                f"cannot load the CLIP {name!r}: {error}. Give a folder that holds "
                "open_clip_config.json and open_clip_model.safetensors (download both from the "
                "model's page if its hub cannot be reached from here), or a name of "
                "open_clip.list_models() with pretrained=..."
            ) from error
        self.model.requires_grad_(False).eval()
        self.template = template
        preprocess = open_clip.get_model_preprocess_cfg(self.model)
        size = preprocess["size"]
        self.size = (size, size) if isinstance(size, int) else tuple(size)
        self.register_buffer("mean", torch.tensor(preprocess["mean"])[:, None, None], False)
        self.register_buffer("std", torch.tensor(preprocess["std"])[:, None, None], False)
        self.mean: Tensor
        self.std: Tensor
        self._texts: dict[str, Tensor] = {}

    def image_features(self, images: Tensor) -> Tensor:
        """Embed images (n, 3, h, w) in [0, 1] -> unit vectors (n, d)."""
        x = clamp01(images).to(self.mean.dtype)
        if x.shape[-2:] != self.size:
            x = F.interpolate(x, self.size, mode="bicubic", align_corners=False, antialias=True)
        return self.model.encode_image((x - self.mean) / self.std, normalize=True)

    @torch.no_grad()
    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """Embed prompts -> unit vectors (n, d); each text is embedded once."""
        device = self.mean.device
        new = [p for p in dict.fromkeys(prompts) if p not in self._texts]
        if new:
            tokens = self.tokenizer([self.template.format(p) for p in new]).to(device)
            features = self.model.encode_text(tokens, normalize=True)
            self._texts |= dict(zip(new, features.cpu(), strict=True))
        return torch.stack([self._texts[p] for p in prompts]).to(self.mean)

    def forward(
        self,
        images: Tensor,
        prompts: Sequence[str] | None = None,
        metadata: Sequence[Any] | None = None,
    ) -> Tensor:
        """Score images (n, 3, h, w) in [0, 1] with one prompt each -> (n,) in [-1, 1].

        Raises:
            ValueError: no prompts, or not one for each image.
        """
        prompts = one_each(images, prompts, "the clip reward")
        seen = torch.stack([self.image_features(view) for view in self._views(images)])
        return (seen * self.text_features(prompts)).sum(-1).mean(0)

    def _views(self, images: Tensor) -> list[Tensor]:
        """Return the views of images (n, 3, h, w), each of their shape."""
        if self.views == 1 and not self.noise:
            return [images]
        x = clamp01(images)
        h, w = x.shape[-2:]
        a, b = max(1, h // 16), max(1, w // 16)
        edge = (2 * b, 2 * b, 2 * a, 2 * a)
        wide = F.pad(x, edge, mode="replicate")
        views = [x, x.flip(-1)]
        for dy, dx in SHIFTS:
            top, left = 2 * a + dy * a, 2 * b + dx * b
            views.append(wide[..., top : top + h, left : left + w])
        views = views[: self.views]
        if not self.noise:
            return views
        grain = torch.randn(
            (len(views), *x.shape[1:]), generator=torch.Generator().manual_seed(0)
        ).to(x)
        return [view + self.noise * g for view, g in zip(views, grain, strict=True)]
