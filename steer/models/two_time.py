"""A two-time network `v(x, s, t, text)` and the flow map on it, `X(s,t,x) = x + (t-s) v(x,s,t)`.

On the diagonal the network is the velocity, `v(x,t,t) = b_t(x)`; off it, it is the map: theory
(10) (Boffi et al. 2025, arXiv 2505.18825). One network is velocity, denoiser and map.
"""

import copy
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steer.flow import FlowMap, per_row
from steer.models.limits import HEADS, check_network
from steer.models.words import BagOfWords, Encoded
from steer.onto import row_times
from steer.path import Linear, Time, as_time, like

__all__ = ["NetworkFlow", "TwoTimeUNet", "Waves"]


def _zero(layer: nn.Module) -> None:
    """Start a layer at zero, so that its block starts as the identity."""
    for p in layer.parameters():
        nn.init.zeros_(p)


class Waves(nn.Module):
    """A time as sines and cosines up to a highest frequency in radians, then a small MLP.

    The derivative in time is bounded by the highest frequency: keep that of the gap low, or the
    map's time derivative becomes very large.
    """

    def __init__(self, highest: float, width: int, waves: int = 16) -> None:
        super().__init__()
        self.highest, self.waves = highest, waves
        self.mlp = nn.Sequential(nn.Linear(2 * waves, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        """Return the embedding of times (n,), (n, width)."""
        last = math.log(2 * self.highest)
        powers = torch.linspace(0, last, self.waves, device=t.device, dtype=torch.float32)
        angle = t[:, None].float() * (powers.exp() / 2)  # float32 for any dtype of the weights
        waves = torch.cat([angle.sin(), angle.cos()], -1)
        return self.mlp(waves.to(next(self.mlp.parameters()).dtype))


class _Residual(nn.Module):
    """Two convolutions, the second modulated by the condition."""

    def __init__(self, channels: int, width: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.condition = nn.Linear(width, 2 * channels)
        self.norm2 = nn.GroupNorm(groups, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        _zero(self.conv2)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.condition(c)[..., None, None].chunk(2, 1)
        h = self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))
        return x + h


class _Attention(nn.Module):
    """Self-attention over the pixels of a small grid."""

    def __init__(self, channels: int, groups: int, heads: int = HEADS) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(groups, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        _zero(self.out)

    def forward(self, x: Tensor) -> Tensor:
        n, c, height, width = x.shape
        qkv = self.qkv(self.norm(x)).reshape(n, 3, self.heads, c // self.heads, height * width)
        q, k, v = qkv.unbind(1)  # (n, heads, c / heads, pixels)
        weights = (q.transpose(-1, -2) @ k / (c // self.heads) ** 0.5).softmax(-1)
        h = v @ weights.transpose(-1, -2).to(v.dtype)
        return x + self.out(h.reshape(n, c, height, width))


class TwoTimeUNet(nn.Module):
    """A U-Net `v(x, s, t, text)` that sees `s` and the gap `t - s` separately.

    Attention on the smallest grid; skips are added. Every block is modulated by one vector: the
    embeddings of s and of t - s, plus the text vector.

    Args:
        vocabulary: words of the text side.
        channels: channels of each level, each a multiple of `groups`; the grid halves between.
        blocks: residual blocks of each level, on the way down and again on the way up.
        size: side of the square picture in pixels.
        width: size of the condition vector.
        groups: groups of the normalisations.
        highest: highest frequency of the embeddings of s and of t - s, in radians.
        guidance: smallest and largest scale of classifier-free guidance that it takes as an
            input; None: it takes none.
        colours: channels of a picture: 3, or 1 for grey ones.

    Raises:
        ValueError: a number that is none or out of bounds, or numbers that do not go together.
    """

    def __init__(
        self,
        vocabulary: Sequence[str],
        channels: Sequence[int] = (32, 64, 128),
        blocks: Sequence[int] = (1, 2, 2),
        *,
        size: int = 32,
        width: int = 192,
        groups: int = 8,
        highest: Sequence[float] = (30.0, 12.0),
        guidance: Sequence[float] | None = None,
        colours: int = 3,
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "vocabulary": list(vocabulary),
            "channels": list(channels),
            "blocks": list(blocks),
            "size": size,
            "width": width,
            "groups": groups,
            "highest": list(highest),
        }
        if guidance is not None:
            self.config["guidance"] = list(guidance)
        if colours != 3:
            self.config["colours"] = colours
        check_network(self.config)
        self.size, self.colours = size, colours
        self.text = BagOfWords(vocabulary, width)
        self.start, self.gap = Waves(highest[0], width), Waves(highest[1], width)
        self.scale: Waves | None = None
        if guidance is not None:
            self.scale = Waves(6.0, width)
            _zero(self.scale.mlp[-1])  # zero at first: the scale is learned later than the rest
        last, levels = len(channels) - 1, range(len(channels))

        def block(c: int, level: int) -> nn.ModuleList:
            attend = _Attention(c, groups) if level == last else nn.Identity()
            return nn.ModuleList([_Residual(c, width, groups), attend])

        self.stem = nn.Conv2d(colours, channels[0], 3, padding=1)
        self.down = nn.ModuleList(
            nn.ModuleList(block(channels[level], level) for _ in range(blocks[level]))
            for level in levels
        )
        self.middle = block(channels[-1], last)
        self.up = nn.ModuleList(
            nn.ModuleList(block(channels[level], level) for _ in range(blocks[level]))
            for level in levels
        )
        pairs = list(itertools.pairwise(channels))
        self.shrink = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairs)
        self.grow = nn.ModuleList(nn.Conv2d(b, a, 1) for a, b in pairs)
        self.skip = nn.ModuleList(
            nn.ModuleList(
                nn.Conv2d(channels[level], channels[level], 1) for _ in range(blocks[level])
            )
            for level in levels
        )
        c = channels[0]
        self.norm = nn.GroupNorm(groups, c)
        self.head = nn.Conv2d(c, colours, 3, padding=1)
        _zero(self.head)

    def forward(
        self, x: Tensor, s: Tensor, t: Tensor, text: Tensor, scale: Tensor | None = None
    ) -> Tensor:
        """Return v, (n, c, h, w), for pictures x (n, c, h, w), times (n,), text (n, width).

        With `guidance`, `scale` (n,) is the scale of classifier-free guidance.
        """
        told = self.start(s) + self.gap(t - s) + text
        if self.scale is not None and scale is not None:
            low, high = self.config["guidance"]
            told = told + self.scale((scale - low) / (high - low))
        return self.carry(x, told)

    def carry(self, x: Tensor, told: Tensor) -> Tensor:
        """Return v for the stem's input, (n, channels, h, w), and the condition (n, width)."""
        c = F.silu(told)
        x = self.stem(x)
        skips = []
        for level, blocks in enumerate(self.down):
            if level:
                x = self.shrink[level - 1](x)
            for residual, attend in blocks:  # type: ignore[attr-defined]
                x = attend(residual(x, c))
                skips.append(x)
        residual, attend = self.middle
        x = attend(residual(x, c))
        for level in reversed(range(len(self.up))):
            if level < len(self.grow):
                x = F.interpolate(self.grow[level](x), scale_factor=2, mode="nearest")
            pairs: Any = zip(self.up[level], self.skip[level], strict=True)  # type: ignore[call-overload]
            for (residual, attend), skip in pairs:
                x = attend(residual(x + skip(skips.pop()), c))
        return self.head(F.silu(self.norm(x)))


class NetworkFlow(FlowMap):
    """The flow map of a two-time network: `X(s,t,x) = x + (t-s) v(x,s,t)`, theory (10).

    Its velocity is `b_t(x) = v(x,t,t)`. Pictures live in [-1, 1], grey ones with one channel.
    Without bound prompts, it is the flow of the empty prompt.

    Args:
        network: the two-time network.
    """

    def __init__(self, network: TwoTimeUNet) -> None:
        super().__init__()
        self.network = network
        self.path = Linear()
        self.event_shape = (network.colours, network.size, network.size)
        self.prompts: list[str] = [""]
        self._posterior: list[Any] = []  # not a submodule: it has its own weights
        self._encoded = Encoded(torch.zeros(1, 1, dtype=torch.long))
        bounds = network.config.get("guidance")
        self._scale: float | Tensor = 0.0 if bounds is None else sum(bounds) / 2

    @property
    def denoiser(self) -> nn.Module:
        """The network, including its small text encoder: velocity and jump call both."""
        return self.network

    @property
    def posterior_map(self) -> Any:
        """The posterior map that was loaded with it, bound to its prompts; or None."""
        return self._posterior[0].given(self.prompts) if self._posterior else None

    def take_posterior(self, found: Any) -> None:
        """Attach a posterior map, which is moved together with the network but is not a submodule.

        Args:
            found: a `steer.PosteriorMap` of this flow.
        """
        self._posterior = [found]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        for posterior in self._posterior:
            posterior._apply(fn)
        return super()._apply(fn, recurse)

    def mean_velocity(self, x: Tensor, s: Time, t: Time) -> Tensor:
        """Return v(x, s, t), (n, *event), in the dtype of `x`."""
        n, weight = len(x), self.network.stem.weight
        s, t = row_times(s, x), row_times(t, x)
        text = per_row(self._encoded(self.network.text, x.device), n, "prompts")
        if self.network.scale is None:
            return self.network(x.to(weight.dtype), s, t, text).to(x.dtype)
        scale = row_times(self._scale, x)
        return self.network(x.to(weight.dtype), s, t, text, scale).to(x.dtype)

    @property
    def takes_guidance(self) -> bool:
        """Whether the guidance scale is an input of the network, see `guided`."""
        return self.network.scale is not None

    def guided(self, scale: float | Tensor, negative: str | None = None) -> "NetworkFlow":
        """Return the same flow at another guidance scale, if its network takes one as an input.

        Each jump is one call at any scale, and jumps compose.

        Args:
            scale: within the network's own range; a number, or one per row (n,).
            negative: must be None, because the negative prompt of the map is the empty one.

        Raises:
            ValueError: the network takes no scale, the scale is out of its range, or a negative
                prompt.
        """
        bounds = self.network.config.get("guidance")
        if bounds is None:
            raise ValueError(
                "this map has no guidance scale as an input: use steer.ClassifierFree"
            )
        if negative:
            raise ValueError(
                "this map uses the empty prompt as its negative prompt: leave the negative prompt "
                "out"
            )
        low, high = bounds
        if not isinstance(scale, Tensor) and not low <= scale <= high:
            raise ValueError(
                f"the map was trained for scales from {low:g} to {high:g}, got {scale:g}"
            )
        view = copy.copy(self)
        view._modules = dict(self._modules)
        view._scale = scale
        return view

    def velocity(self, x: Tensor, t: Time) -> Tensor:
        """Return `b_t(x) = v(x, t, t)`."""
        return self.mean_velocity(x, t, t)

    def jump(self, x: Tensor, s: Time, t: Time) -> Tensor:
        """Return `X(s,t,x) = x + (t - s) v(x, s, t)`: exactly x where s = t."""
        gap = as_time(t) - as_time(s)
        return x + like(gap, x) * self.mean_velocity(x, s, t)

    def given(self, prompts: Sequence[str]) -> "NetworkFlow":
        """Bind p prompts; the result shares the parameters and takes p * n rows, prompt-major.

        Words that the model was not trained on are dropped, with a warning that names them.

        Raises:
            ValueError: no prompt at all.
        """
        encoded = self.network.text.bind(prompts, stacklevel=3)
        bound = copy.copy(self)
        bound._modules = dict(self._modules)
        bound.prompts, bound._encoded = list(prompts), encoded
        return bound

    def decode(self, x: Tensor) -> Tensor:
        """Return pictures `(x + 1) / 2`, (n, 3, h, w), not clamped."""
        images = (x + 1) / 2
        return images.expand(-1, 3, -1, -1) if self.network.colours == 1 else images

    def encode(self, images: Tensor) -> Tensor:
        """Return `2 images - 1`, in [-1, 1]; where pictures are grey, of the channels' mean."""
        if self.network.colours == 1:
            images = images.mean(1, keepdim=True)
        return 2 * images - 1
