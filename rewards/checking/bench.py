"""The test bench of a reward: ordinary and hard pictures, prompts, and how they are scored."""

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rewards.checking.report import Finding
from steer.devices import differentiating, usable_device
from steer.reward import Reward, check_scores, name_of

__all__ = ["PROMPTS", "Bench", "ask", "ordinary"]

PROMPTS = ("a red apple", "a cat", "a house", "a green leaf", "a blue car", "the sun")
"""Default prompts of a reward that needs prompts."""


def ask(reward: Reward, images: Tensor, prompts: Sequence[str] | None) -> Tensor:
    """Score copies of the images, (n,), so that a reward may change them."""
    return check_scores(reward(images, prompts), images, name_of(reward))


class Bench:
    """A reward with the pictures and prompts that it is tested on.

    Attributes:
        images: ordinary pictures (n, 3, h, w).
        hard: name -> a picture (3, h, w).
        prompts: the prompts that the pictures get in turn; None: no prompts.
        needs_prompts: whether it raises an error without prompts.
        done: findings of the earlier checks.
    """

    def __init__(
        self,
        reward: Reward,
        prompts: str | Sequence[str] | None,
        pictures: Tensor,
        device: str | torch.device | None,
        seed: int,
    ) -> None:
        if prompts is not None and not len(prompts):
            raise ValueError("no prompts in the list: give some, or leave it out")
        self.prompts = [prompts] if isinstance(prompts, str) else prompts and list(prompts)
        self.generator = torch.Generator().manual_seed(seed)
        self.reward, self.device = reward, _device(reward, device)
        self.images = pictures.to(self.device)
        self.hard = {k: x.to(self.device) for k, x in _hard(pictures, self.generator).items()}
        self.done: dict[str, Finding] = {}
        self.needs_prompts = False
        self._base: Tensor | None = None

    def settle(self) -> None:
        """Find out whether the reward needs prompts."""
        try:
            with torch.no_grad():
                self.reward(self.images[:1].clone(), None)
        except Exception:  # any other fault is reported by the first check
            self.needs_prompts = True
            self.prompts = self.prompts or list(PROMPTS)

    @property
    def names(self) -> list[str]:
        """The names of the pictures of `every`."""
        return [*(f"ordinary {i + 1}" for i in range(len(self.images))), *self.hard]

    @property
    def every(self) -> Tensor:
        """The ordinary pictures and the hard ones, (n, 3, h, w)."""
        return torch.cat([self.images, torch.stack(list(self.hard.values()))])

    def rows(self, n: int) -> list[str] | None:
        """Return n prompts, or None."""
        if self.prompts is None:
            return None
        return [self.prompts[i % len(self.prompts)] for i in range(n)]

    @torch.no_grad()
    def scores(
        self, images: Tensor, prompts: list[str] | None = None, reward: Reward | None = None
    ) -> Tensor:
        """Score images (n, 3, h, w) -> (n,), in float64 on the CPU."""
        asked = self.rows(len(images)) if prompts is None else prompts
        return ask(reward or self.reward, images.clone(), asked).detach().double().cpu()

    def gradient(self, images: Tensor, reward: Reward | None = None) -> Tensor:
        """Return d score_i / d image_i, (n, 3, h, w)."""
        x = images.detach().requires_grad_()
        # with unequal weights, terms that cancel in a plain sum are detected, and so is a backward
        # pass that ignores its upstream gradient
        weights = 1.0 + torch.arange(len(x), device=x.device) % 2
        with differentiating():
            scores = ask(reward or self.reward, x.clone(), self.rows(len(x)))
            weighted = (scores * weights.to(scores)).sum()
            (gradient,) = torch.autograd.grad(weighted, x, allow_unused=True)
        if gradient is None:
            return torch.zeros_like(x)
        return gradient / weights.to(gradient)[:, None, None, None]

    @property
    def base(self) -> Tensor:
        """Scores of the ordinary pictures, (n,)."""
        if self._base is None:
            self._base = self.scores(self.images)
        return self._base

    @property
    def spread(self) -> float:
        """The standard deviation of the base scores, at least the resolution of float32."""
        known = self.base[self.base.isfinite()]
        if not len(known):
            return 1.0
        return max(float(known.std(unbiased=False)), 1e-5 * float(known.abs().max()), 1e-30)

    def apart(self, a: Tensor, b: Tensor) -> float:
        """Return the largest difference, in units of `spread`; NaN in both counts as equal."""
        difference = (a - b).abs()[~((a == b) | (a.isnan() & b.isnan()))]
        worst = float(difference.max()) / self.spread if len(difference) else 0.0
        return math.inf if math.isnan(worst) else worst

    def ok(self, name: str) -> bool:
        """Return whether an earlier check passed."""
        return self.done[name].verdict in {"pass", "warn"}

    def copied(self, *to: Any) -> Reward:
        """Return a copy of the reward, moved to another device or dtype."""
        return copy.deepcopy(self.reward).to(*to)


def ordinary(size: int, images: Tensor | None, seed: int) -> Tensor:
    """Return the ordinary pictures: four smooth ones, four shapes on white, or those given."""
    if images is not None:
        if images.ndim != 4 or images.shape[1] != 3 or len(images) < 2:
            raise ValueError(f"images must be (n, 3, h, w) with n >= 2, got {tuple(images.shape)}")
        if not images.is_floating_point() or images.min() < 0 or images.max() > 1:
            raise ValueError("images must be floats in [0, 1]: divide bytes by 255, and clamp")
        size = min(images.shape[-2:])
    if not isinstance(size, int) or size < 8:
        raise ValueError(f"size must be a whole number of 8 pixels or more, got {size!r}")
    if images is not None:
        return images.detach().float().clone()
    g = torch.Generator().manual_seed(seed)
    coarse = torch.rand((4, 3, 5, 5), generator=g)
    smooth = F.interpolate(coarse, (size, size), mode="bicubic", align_corners=True).clamp(0, 1)
    along = (torch.arange(size) + 0.5) / size
    y, x = along[:, None], along[None]
    shapes = []
    for i in range(4):
        a, b, r = (torch.rand(3, generator=g) - 0.5) * 0.25 + torch.tensor([0.5, 0.5, 0.26])
        distance = torch.hypot(y - a, x - b) if i % 2 else torch.maximum(abs(y - a), abs(x - b))
        inside = ((r - distance) * size + 0.5).clamp(0, 1)
        colour = 0.9 * torch.rand((3, 1, 1), generator=g)
        shapes.append(1 - inside * (1 - colour))
    return torch.cat([smooth, torch.stack(shapes)])


def _hard(images: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Return pictures on which formulas break: name -> (3, h, w)."""
    x = torch.zeros_like(images[0])
    h, w = x.shape[-2:]
    chessboard = ((torch.arange(h)[:, None] + torch.arange(w)) % 2).to(x).expand_as(x)
    return {
        "black": x,
        "white": x + 1,
        "grey": x + 0.5,
        "red": x + torch.tensor([1.0, 0, 0])[:, None, None],
        "chessboard": chessboard,
        "noise": torch.rand(x.shape, generator=generator),
    }


def _device(reward: Reward, device: str | torch.device | None) -> torch.device:
    """Move the reward to a device, or return the device that it is on."""
    if device is None:
        some = next(iter([*reward.parameters(), *reward.buffers()]), None)
        return torch.device("cpu") if some is None else some.device
    usable_device(device)
    reward.to(device)
    return torch.device(device)
