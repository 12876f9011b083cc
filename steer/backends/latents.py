"""Between a denoiser's state and pictures: patches, the autoencoder's scaling, its decoder."""

from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from steer.backends.checks import dtype_of

__all__ = ["Codec", "Layout", "patched", "unpatched"]

Layout = Literal["grid", "patches", "tokens", "frames"]
"""The layout of a state: as the autoencoder's latent, (n, c, h, w) or (n, c, frames, h, w); in
patches of 2 x 2, (n, 4 c, h / 2, w / 2); as a sequence of patches, (n, h w / 4, 4 c); with frames
first, (n, f, c, h, w).
"""


def patched(z: Tensor) -> Tensor:
    """Return (n, c, h, w) in patches of 2 x 2, (n, 4 c, h / 2, w / 2).

    >>> import torch
    >>> patched(torch.arange(4.0).reshape(1, 1, 2, 2)).flatten()
    tensor([0., 1., 2., 3.])
    """
    n, c, h, w = z.shape
    z = z.reshape(n, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4)
    return z.reshape(n, 4 * c, h // 2, w // 2)


def unpatched(z: Tensor) -> Tensor:
    """Return the inverse of `patched`.

    >>> import torch
    >>> z = torch.arange(32.0).reshape(1, 2, 4, 4)
    >>> bool((unpatched(patched(z)) == z).all())
    True
    """
    n, c, h, w = z.shape
    z = z.reshape(n, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3)
    return z.reshape(n, c // 4, 2 * h, 2 * w)


@dataclass(frozen=True)
class Codec:
    """Convert states to pictures and back, with an autoencoder of diffusers.

    Attributes:
        vae: the autoencoder.
        layout: layout of the states.
        grid: rows and columns of patches, for tokens.
        epsilon: epsilon of the BatchNorm of patches (FLUX.2), if it differs from the
            configuration.
    """

    vae: Any
    layout: Layout
    grid: tuple[int, int]
    epsilon: float | None = None

    def decode(self, x: Tensor) -> Tensor:
        """Return pictures (n, 3, h, w), or clips (n, 3, frames, h, w), nominally in [0, 1]."""
        return self.pictures(self.to_vae(x))

    def pictures(self, z: Tensor) -> Tensor:
        """Decode the autoencoder's latents to pictures, in its dtype."""
        still = z.ndim == 4 and _has_frames(self.vae)
        if still:
            z = z.unsqueeze(2)
        made = self.vae.decode(z.to(dtype_of(self.vae)), return_dict=False)[0].to(z.dtype)
        made = made * 0.5 + 0.5
        return made[:, :, 0] if still else made

    def to_vae(self, x: Tensor) -> Tensor:
        """Convert states to the autoencoder's latents."""
        z = self.grid_of(x)
        patches = self.layout in ("tokens", "patches")
        if self._by_patch:
            std, mean = self._scale(z)
            z = z * std + mean
        if patches:
            z = unpatched(z)
        if not self._by_patch:
            std, mean = self._scale(z)
            z = z * std + mean
        return z

    def encode(self, images: Tensor, still: bool) -> Tensor:
        """Return the states of pictures in [0, 1]: the mean, if there is a distribution.

        Args:
            images: (n, 3, h, w).
            still: whether states have no axis of frames.
        """
        seen = (2 * images - 1).to(dtype_of(self.vae))
        frames = _has_frames(self.vae)
        found = self.vae.encode(seen.unsqueeze(2) if frames else seen, return_dict=False)[0]
        z = found.mode() if hasattr(found, "mode") and not isinstance(found, Tensor) else found
        z = z.to(images.dtype)
        if frames and still:
            z = z[:, :, 0]
        if not self._by_patch:
            std, mean = self._scale(z)
            z = (z - mean) / std
        if self.layout in ("tokens", "patches"):
            z = patched(z)
        if self._by_patch:
            std, mean = self._scale(z)
            z = (z - mean) / std
        if self.layout == "tokens":
            return z.flatten(2).transpose(1, 2)
        return z.transpose(1, 2) if self.layout == "frames" else z

    def grid_of(self, x: Tensor) -> Tensor:
        """Return states as (n, c, h, w) or (n, c, frames, h, w), patches as channels."""
        if self.layout == "tokens":
            return x.unflatten(1, self.grid).permute(0, 3, 1, 2)
        return x.transpose(1, 2) if self.layout == "frames" else x

    @property
    def _by_patch(self) -> bool:
        return getattr(self.vae, "bn", None) is not None

    def _scale(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return the standard deviation and mean by which latents are normalised.

        They are per channel of the patches if the autoencoder has a BatchNorm of patches (FLUX.2),
        else per channel, or one number for all.
        """
        config, shape = self.vae.config, (1, -1, *[1] * (z.ndim - 2))
        if self._by_patch:
            norm = self.vae.bn
            epsilon = config.batch_norm_eps if self.epsilon is None else self.epsilon
            std = (norm.running_var + epsilon).sqrt()
            return std.view(shape).to(z), norm.running_mean.view(shape).to(z)
        mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
        if mean is not None and std is not None:
            return z.new_tensor(std).view(shape), z.new_tensor(mean).view(shape)
        factor = getattr(config, "scaling_factor", None) or 1.0
        shift = getattr(config, "shift_factor", None) or 0.0
        return z.new_tensor(1 / factor), z.new_tensor(shift)


_FRAMES: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def _has_frames(vae: nn.Module) -> bool:
    """Return whether an autoencoder is for clips; the result is cached."""
    if vae not in _FRAMES:
        _FRAMES[vae] = any(p.ndim == 5 for p in vae.parameters())
    return _FRAMES[vae]
