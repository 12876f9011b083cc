"""Cheaper pictures for the reward's gradient; the returned pictures are decoded in full.

At high resolution most of the memory of a gradient is the decoder's activations. Before the end,
the reward can be evaluated on the output of a tiny autoencoder, on a smaller picture, or on its
middle. This only changes the potential `r_t` at t < 1, on which the sampled law does not depend:
at t = 1, where no gradient is taken, the reward gets the whole picture.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steer import hub
from steer.backends.checks import dtype_of
from steer.backends.folders import needs_diffusers
from steer.backends.latents import Codec
from steer.backends.recomputing import again, by_block, has_blocks
from steer.ranges import count

__all__ = ["Glimpse"]


@dataclass(frozen=True)
class Glimpse:
    """How pictures are decoded where a gradient passes through.

    Attributes:
        vae: another autoencoder, for instance a tiny one; None: the pipeline's own.
        size: height and width as a fraction of the whole, 1/2 or 1/4. Latents are averaged,
            decoded at the small size, and the pictures enlarged again, so that rewards get the
            usual size.
        crop: height and width of the middle that is decoded, in pixels; None: all.
        rows: maximum number of rows in a decoder call; each call is recomputed in the backward
            pass.
    """

    vae: Any = None
    size: float = 1.0
    crop: int | None = None
    rows: int | None = None

    @staticmethod
    def of(vae: Any, size: float | None, crop: int | None, rows: int | None) -> "Glimpse | None":
        """Return the glimpse with these options; None if none of them is set.

        Raises:
            ValueError: a size that is not a half or a quarter, numbers below one, a file of
                another autoencoder.
        """
        if vae is None and size in (None, 1) and crop is None and rows is None:
            return None
        if size not in (None, 1, 0.5, 0.25):
            raise ValueError(f"guide_size must be 1, 0.5 or 0.25, got {size}: it is a share")
        for name, number in {"guide_crop": crop, "decode_rows": rows}.items():
            if number is not None:
                count(name, number)
        return Glimpse(_loaded(vae), 1.0 if size is None else float(size), crop, rows)

    def decode(self, codec: Codec, x: Tensor, checkpointing: bool) -> Tensor:
        """Return pictures (n, 3, h, w) for a gradient, not clamped; clips (n, 3, frames, h, w).

        Args:
            codec: the pipeline's own.
            x: states.
            checkpointing: whether blocks of the decoder are recomputed.

        Raises:
            ValueError: latents that the other autoencoder does not take.
        """
        if self.vae is not None:
            codec = replace(codec, vae=_beside(self.vae, codec.vae))

        def seen(part: Tensor) -> Tensor:
            z = codec.to_vae(part)
            self._check(z)
            return self._enlarged(codec.pictures(self._smaller(z, codec)), z)

        if self.rows is None or len(x) <= self.rows:
            if checkpointing and has_blocks(codec.vae):
                with by_block(codec.vae):
                    return seen(x)
            return again(seen, codec.vae, x) if checkpointing else seen(x)
        return torch.cat([again(seen, codec.vae, part) for part in x.split(self.rows)])

    def _check(self, z: Tensor) -> None:
        known = getattr(getattr(self.vae, "config", None), "latent_channels", None)
        if known is not None and known != z.shape[1]:
            raise ValueError(
                f"guide_vae decodes latents of {known} channels, and this pipeline's have "
                f"{z.shape[1]}: take the tiny autoencoder that was made for it"
            )

    def _smaller(self, z: Tensor, codec: Codec) -> Tensor:
        if self.crop is not None:
            scale = _scale(codec.vae)
            h, w = (max(1, min(side, self.crop // scale)) for side in z.shape[-2:])
            top, left = (z.shape[-2] - h) // 2, (z.shape[-1] - w) // 2
            z = z[..., top : top + h, left : left + w]
        for _ in range({1.0: 0, 0.5: 1, 0.25: 2}[self.size]):
            h, w = z.shape[-2] // 2 * 2, z.shape[-1] // 2 * 2
            z = z[..., :h, :w].unflatten(-1, (-1, 2)).mean(-1).unflatten(-2, (-1, 2)).mean(-2)
        return z

    def _enlarged(self, images: Tensor, z: Tensor) -> Tensor:
        if self.size == 1:
            return images
        factor = round(1 / self.size)
        flat = images.transpose(1, 2).flatten(0, 1) if images.ndim == 5 else images
        made = F.interpolate(flat, scale_factor=factor, mode="bilinear", align_corners=False)
        return made if images.ndim == 4 else made.unflatten(0, (len(images), -1)).transpose(1, 2)


def _scale(vae: Any) -> int:
    """Return the number of pixels per latent, along one side."""
    config = vae.config
    said = config.get("spatial_compression_ratio") or config.get("scale_factor_spatial")
    if said:
        return int(said)
    for name in ("block_out_channels", "decoder_block_out_channels", "dim_mult"):
        levels = config.get(name)
        if levels:
            return 2 ** (len(levels) - 1)
    return 8


def _beside(vae: Any, own: nn.Module) -> Any:
    """Return the other autoencoder on the device and in the precision of the pipeline's own."""
    device, dtype = next(own.parameters()).device, dtype_of(own)
    first = next(vae.parameters())
    if first.device != device or first.dtype != dtype:
        vae.to(device=device, dtype=dtype)
    return vae


def _loaded(vae: Any) -> Any:
    """Return an autoencoder: an object unchanged, or a tiny one of a folder or the hub, frozen."""
    if vae is None:
        return None
    if isinstance(vae, str | Path):
        found = hub.named(vae)
        place = str(vae) if found is None else found.repo
        made, said = needs_diffusers().AutoencoderTiny.from_pretrained(
            place, use_safetensors=True, output_loading_info=True,
            revision=None if found is None else found.revision,
        )  # fmt: skip
        wrong = [*said.get("missing_keys", ()), *said.get("unexpected_keys", ())]
        if wrong:
            raise ValueError(
                f"{vae} is not an AutoencoderTiny of this release of diffusers: {len(wrong)} of "
                f"its weights have no place ({wrong[0]}), so that it would decode wrongly"
            )
        vae = made
    if not hasattr(vae, "decode"):
        raise ValueError(
            f"guide_vae must have decode(latents), and a {type(vae).__name__} has none"
        )
    return vae.eval().requires_grad_(False)
