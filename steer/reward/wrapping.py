"""Rewards of what is not one yet: functions, objects with `score`, metrics, functions of PIL."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from steer.reward.base import Reward

__all__ = ["wrap"]


class _Wrapped(Reward):
    """A callable as a reward."""

    def __init__(
        self, f: Callable[..., Any], differentiable: bool, call: Callable[..., Any], pil: bool
    ) -> None:
        super().__init__()
        self.f, self.differentiable, self.pil = f, differentiable, pil
        self._call = call
        self._arity = _positional(call)

    def forward(
        self,
        images: Tensor,
        prompts: Sequence[str] | None = None,
        metadata: Sequence[Any] | None = None,
    ) -> Tensor:
        """Call the function with as many of (images, prompts, metadata) as it takes."""
        seen = _pictures(images) if self.pil else images
        found = self._call(*(seen, prompts, metadata)[: self._arity])
        if isinstance(found, tuple) and len(found) == 2:
            found = found[0]  # (scores, info)
        if not self.differentiable and not isinstance(found, Tensor):
            found = torch.as_tensor(found, dtype=torch.float32, device=images.device)
        if isinstance(found, Tensor) and found.shape == (len(images), 1):
            found = found[:, 0]
        if not self.differentiable and isinstance(found, Tensor):
            found = found.detach()
        return found


def _pictures(images: Tensor) -> list[Any]:
    """Return images (n, 3, h, w) in [0, 1] as PIL pictures."""
    from PIL import Image

    pixels = images.detach().float().clamp(0, 1).mul(255).round().byte()
    return [Image.fromarray(p) for p in pixels.permute(0, 2, 3, 1).cpu().numpy()]


def _one_by_one(metric: Any, sign: float) -> Callable[[Tensor], Tensor]:
    """Return a torchmetrics metric as a score of each image by itself."""

    def call(images: Tensor) -> Tensor:
        scores = []
        for image in images.split(1):
            scores.append(sign * metric(image).reshape(()))
            metric.reset()
        return torch.stack(scores)

    return call


def _is_metric(f: Any) -> bool:
    return all(hasattr(f, name) for name in ("higher_is_better", "update", "compute", "reset"))


def _positional(f: Callable[..., Any]) -> int:
    """Count how many of (images, prompts, metadata) `f` takes by position."""
    try:
        parameters = inspect.signature(f.forward if isinstance(f, nn.Module) else f).parameters
    except ValueError:  # builtins without a signature
        return 1
    kinds = [p.kind for p in parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL in kinds:
        return 3
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    named = [p for p in parameters.values() if p.kind in by_position]
    required = sum(p.default is inspect.Parameter.empty for p in named)
    # optional parameters are passed only where they are named as ours are
    known = ["images", "prompts", "metadata"]
    optional = sum(
        p.name == known[i] for i, p in enumerate(named[:3]) if i >= required and i < len(known)
    )
    count = required + optional
    if not 1 <= count <= 3:
        raise TypeError(
            f"a reward is f(images), f(images, prompts) or f(images, prompts, metadata); "
            f"{f!r} needs {required} arguments"
        )
    return count


def wrap(f: Any, differentiable: bool | None = None, pil: bool = False) -> Reward:
    """Make a reward of any callable or object that scores images.

    A reward stays as it is, unless it is to be taken as not differentiable. What it may be:

    - `f(images)`, `f(images, prompts)` or `f(images, prompts, metadata)`, images (n, 3, h, w) in
      [0, 1]; it returns (n,), (n, 1), or (scores, anything);
    - an object with a method `score(images, prompts)`, which is called in place of the object;
    - a torchmetrics metric of one image, asked of each image by itself; where lower is better
      it is negated;
    - with `pil`, a function of a list of PIL pictures that returns a list of numbers.

    Args:
        f: any of these.
        differentiable: say False where the scores carry no gradient to the images. Default: what
            `f.differentiable` says, else True.
        pil: `f` takes PIL pictures, so there is no gradient.

    Raises:
        TypeError: `f` is no such thing, or needs more arguments than a reward has.
        ValueError: a metric that does not say whether higher is better; `pil` with a gradient.
    """
    if isinstance(f, Reward) and (differentiable is not False or not f.differentiable):
        return f
    if pil and differentiable:
        raise ValueError("a function of PIL pictures has no gradient: leave differentiable out")
    said = getattr(f, "differentiable", True) if differentiable is None else differentiable
    call = f
    if _is_metric(f):
        if f.higher_is_better is None:
            raise ValueError(
                f"{type(f).__name__} does not say whether higher is better: wrap a function, as "
                "in wrap(lambda images: -torch.stack([metric(x[None]) for x in images]))"
            )
        call = _one_by_one(f, 1.0 if f.higher_is_better else -1.0)
        if differentiable is None:
            said = bool(f.is_differentiable)
    elif not isinstance(f, Reward) and callable(getattr(f, "score", None)):
        call = f.score
    if not callable(call):
        raise TypeError(
            f"a reward is a callable on images or has a method score, got {type(f).__name__}"
        )
    return _Wrapped(f, bool(said) and not pil, call, pil)
