"""`wrap`: make a reward from a function, an object with `score`, a metric, or a PIL function."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from steer.reward.base import Reward, clamp01, name_of

__all__ = ["wrap"]


class _Wrapped(Reward):
    """A callable as a reward."""

    def __init__(
        self,
        f: Callable[..., Any],
        call: Callable[..., Any],
        differentiable: bool,
        pil: bool,
        clamp: bool,
    ) -> None:
        super().__init__()
        self.f, self.differentiable, self.pil, self.pictures = f, differentiable, pil, clamp
        self._call = call
        self._positions, self._keywords = _parameters(call)
        self.takes = (*KNOWN[: self._positions], *self._keywords.values())

    def forward(
        self,
        images: Tensor,
        prompts: Sequence[str] | None = None,
        metadata: Sequence[Any] | None = None,
    ) -> Tensor:
        """Call the function with those of (images, prompts, metadata) that it takes."""
        seen: Any = images
        if self.pil:
            seen = _pictures(images)
        elif self.pictures and images.ndim == 4:
            seen = clamp01(images)
        given = dict(zip(KNOWN, (seen, prompts, metadata), strict=True))
        by_name = {name: given[what] for name, what in self._keywords.items()}
        found = self._call(*list(given.values())[: self._positions], **by_name)
        if isinstance(found, tuple) and len(found) == 2:
            found = found[0]  # (scores, info)
        if not self.differentiable and not isinstance(found, Tensor):
            found = torch.as_tensor(found, dtype=torch.float32, device=images.device)
        if isinstance(found, Tensor) and found.shape == (len(images), 1):
            found = found[:, 0]
        if not self.differentiable and isinstance(found, Tensor):
            found = found.detach()
        return found

    def extra_repr(self) -> str:
        """Describe the arguments that the function takes."""
        return f"{name_of(self)}({', '.join(self.takes)})"


def _pictures(images: Tensor) -> list[Any]:
    """Return images (n, 3, h, w) in [0, 1] as PIL pictures."""
    from PIL import Image

    pixels = images.detach().float().clamp(0, 1).mul(255).round().byte()
    return [Image.fromarray(p) for p in pixels.permute(0, 2, 3, 1).cpu().numpy()]


def _one_by_one(metric: Any, sign: float) -> Callable[[Tensor], Tensor]:
    """Wrap a torchmetrics metric as a score of each single image."""

    def call(images: Tensor) -> Tensor:
        scores = []
        for image in images.split(1):
            scores.append(sign * metric(image).reshape(()))
            metric.reset()
        return torch.stack(scores)

    return call


def _is_metric(f: Any) -> bool:
    return all(hasattr(f, name) for name in ("higher_is_better", "update", "compute", "reset"))


KNOWN = ("images", "prompts", "metadata")
"""The arguments of a reward, in this order."""

NAMES = {
    "images": {"images", "image", "x"},
    "prompts": {"prompts", "prompt", "captions", "caption", "texts", "text"},
    "metadata": {"metadata"},
}
"""Names of optional parameters that get one of these arguments."""


def _parameters(f: Callable[..., Any]) -> tuple[int, dict[str, str]]:
    """Return how many of `KNOWN` a callable takes by position, and which by keyword.

    Required parameters are passed by position, regardless of their names. Optional ones get the
    argument that their name indicates, and `**kwargs` the rest.
    """
    try:
        parameters = inspect.signature(f.forward if isinstance(f, nn.Module) else f).parameters
    except ValueError:  # builtins without a signature
        return 1, {}
    kinds = {p.kind for p in parameters.values()}
    if inspect.Parameter.VAR_POSITIONAL in kinds:
        return 3, {}
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    named = [p for p in parameters.values() if p.kind in by_position]
    count = sum(p.default is inspect.Parameter.empty for p in named)
    for p in named[count:3]:
        if p.name not in NAMES[KNOWN[count]]:
            break
        count += 1
    if not 1 <= count <= 3:
        raise TypeError(
            f"a reward is f(images), f(images, prompts) or f(images, prompts, metadata); "
            f"{f!r} needs {count} arguments"
        )
    left = KNOWN[count:]
    keywords = {}
    for p in [*named[count:], *(p for p in parameters.values() if p.kind is p.KEYWORD_ONLY)]:
        meant = [what for what in left if p.name in NAMES[what]]
        if meant and p.kind is not p.POSITIONAL_ONLY:
            keywords[p.name] = meant[0]
    if inspect.Parameter.VAR_KEYWORD in kinds:
        keywords |= {what: what for what in left if what not in keywords.values()}
    return count, keywords


def wrap(
    f: Any, differentiable: bool | None = None, pil: bool = False, clamp: bool = True
) -> Reward:
    """Make a reward from any callable or object that scores images.

    A Reward is returned unchanged, unless `differentiable=False` is given. `f` may be:

    - `f(images)`, `f(images, prompts)` or `f(images, prompts, metadata)`, images (n, 3, h, w) in
      [0, 1]; it returns (n,), (n, 1), or (scores, anything). Optional parameters with names such
      as prompt or captions get the prompts, `**kwargs` the rest;
    - an object with a method `score(images, prompts)`, which is called;
    - a torchmetrics metric of one image, called for each image; it is negated if lower is better;
    - with `pil`, a function of a list of PIL pictures that returns a list of numbers.

    Args:
        f: any of these.
        differentiable: give False if the scores have no gradient with respect to the images.
            Default: `f.differentiable`, else True.
        pil: `f` takes PIL pictures, so there is no gradient.
        clamp: clamp the pictures to [0, 1] first, with the gradient passed straight through. Give
            False for a reward that needs them as decoded, or that does not score pictures.

    Raises:
        TypeError: `f` is none of these, or needs more arguments than a reward has.
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
    return _Wrapped(f, call, bool(said) and not pil, pil, clamp)
