"""The held-out judge: it measures picture quality independently of the optimised reward.

It shares nothing with the reward `clip`: a convolutional network with hashed character n-grams for
its text, another seed, other augmentations, and the pairs that all other training leaves out. It
deliberately has no gradient and is in no list of rewards: it is never used for guidance or tuning.
"""

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rewards.models.prompts import one_each
from steer.hub import folder_with, named
from steer.reward import Reward

__all__ = ["EMBEDDED", "Judge", "JudgeNetwork"]

EMBEDDED = Path(__file__).with_name("zoo") / "judge"


class _Block(nn.Module):
    """Two 3x3 convolutions with a residual connection."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(8, channels),
            nn.GELU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.GroupNorm(8, channels),
            nn.GELU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class JudgeNetwork(nn.Module):
    """Embed pictures and texts in one space.

    Args:
        channels: channels of each level; each level halves the side.
        blocks: residual blocks per level.
        buckets: number of buckets of the hash of character n-grams.
        dim: dimension of the joint space.
    """

    def __init__(
        self,
        channels: Sequence[int] = (32, 64, 128, 192),
        blocks: Sequence[int] = (1, 1, 2, 1),
        buckets: int = 8192,
        dim: int = 128,
    ) -> None:
        super().__init__()
        self.settings = {
            "channels": list(channels), "blocks": list(blocks), "buckets": buckets, "dim": dim,
        }  # fmt: skip
        layers: list[nn.Module] = []
        before = 3
        for width, count in zip(channels, blocks, strict=True):
            layers.append(nn.Conv2d(before, width, 3, padding=1, stride=1 if before == 3 else 2))
            layers += [_Block(width) for _ in range(count)]
            before = width
        self.trunk = nn.Sequential(*layers, nn.GroupNorm(8, before), nn.GELU())
        self.head = nn.Linear(2 * before, dim)
        self.grams = nn.EmbeddingBag(buckets, dim, mode="mean")
        self.text = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)
        )
        self.log_scale = nn.Parameter(torch.tensor(2.3))

    def features(self, images: Tensor) -> Tensor:
        """Return pooled features of images (n, 3, 32, 32) in [0, 1] -> (n, d)."""
        h = self.trunk(2 * images - 1)
        return torch.cat([h.mean((2, 3)), h.amax((2, 3))], 1)

    def encode_image(self, images: Tensor) -> Tensor:
        """Embed images (n, 3, 32, 32) in [0, 1] -> unit vectors (n, dim)."""
        return F.normalize(self.head(self.features(images)), dim=-1)

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Embed texts -> unit vectors (n, dim)."""
        bags = [grams(text, self.grams.num_embeddings) for text in texts]
        device = self.log_scale.device
        offsets = torch.tensor([0, *[len(bag) for bag in bags[:-1]]]).cumsum(0)
        flat = torch.tensor([g for bag in bags for g in bag])
        pooled = self.grams(flat.to(device), offsets.to(device))
        return F.normalize(self.text(pooled), dim=-1)


def grams(text: str, buckets: int) -> list[int]:
    """Hash a text's words and their character n-grams, n = 3 to 5.

    >>> grams("cat", 100) == grams("a CAT", 100)
    True
    """
    words = [w for w in text.lower().split() if w not in {"a", "an", "the"}] or ["<none>"]
    pieces = [f"^{w}$" for w in words]
    for word in list(pieces):
        for n in (3, 4, 5):
            pieces += [word[i : i + n] for i in range(len(word) - n + 1)]
    return [zlib.crc32(p.encode()) % buckets for p in pieces]


class Judge(Reward):
    """`cos(image, text)` by the judge's network, in [-1, 1]. No gradient.

    Args:
        folder: the folder with its config.json and model.safetensors, or hf://owner/name@revision.
            Default: that of the package.

    Raises:
        FileNotFoundError: the folder lacks one of them.
        ValueError: the weights are incomplete, or belong to another network.
    """

    differentiable = False

    def __init__(self, folder: str | Path | None = None) -> None:
        super().__init__()
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        self.embedded = folder is None
        files = "config.json", "model.safetensors"
        found = named(folder)
        if found is not None:
            folder = folder_with(found, *files)
        if folder is not None:  # a judge of the user's is identified by its files
            self.made_of = tuple(Path(folder) / name for name in files)
        folder = EMBEDDED if folder is None else Path(folder)
        for name in files:
            if not (folder / name).is_file():
                raise FileNotFoundError(f"no {name} in {folder}: train a judge, or reinstall")
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.network = JudgeNetwork(**settings)
        try:
            state = load_file(folder / "model.safetensors")
            self.network.load_state_dict({k: v.float() for k, v in state.items()})
        except (SafetensorError, RuntimeError) as error:
            raise ValueError(
                f"{folder / 'model.safetensors'} is incomplete, or belongs to another judge: "
                f"{error}. Reinstall the package, or train the judge again"
            ) from error
        self.network.requires_grad_(False).eval()

    def _fitted(self, images: Tensor) -> Tensor:
        x = images.detach().clamp(0, 1).to(self.network.log_scale)
        if x.shape[-2:] != (32, 32):
            x = F.interpolate(x, (32, 32), mode="bilinear", antialias=True)
        return x

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Return pooled features (n, d): for distances between pictures."""
        return self.network.features(self._fitted(images))

    @torch.no_grad()
    def similarity(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Compare n images with p prompts -> cosines (n, p)."""
        return (
            self.network.encode_image(self._fitted(images)) @ self.network.encode_text(prompts).T
        )

    @torch.no_grad()
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
        prompts = one_each(images, prompts, "the judge")
        pictures = self.network.encode_image(self._fitted(images))
        return (pictures * self.network.encode_text(prompts)).sum(-1)
