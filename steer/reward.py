"""What a reward is: a module that gives one number a sample, higher is better.

>>> darkness = wrap(lambda images: -images.mean((1, 2, 3)))
>>> (0.5 * darkness + 2 * darkness)(torch.ones(2, 3, 4, 4))
tensor([-2.5000, -2.5000])
"""

import inspect
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "LinearReward",
    "QuadraticReward",
    "Reward",
    "WeightedSum",
    "clamp01",
    "name_of",
    "score",
    "term_scores",
    "wrap",
]


class Reward(nn.Module):
    """A reward: images (n, 3, h, w) as `FlowMap.decode` gives them -> scores (n,).

    Never reduced over the batch, higher is better, in whatever units are natural. Rewards add and
    scale: `0.7 * a + 0.3 * b` is a reward.

    Attributes:
        differentiable: whether the scores carry a gradient to the images.
    """

    differentiable: bool = True

    @abstractmethod
    def forward(
        self,
        images: Tensor,
        prompts: Sequence[str] | None = None,
        metadata: Sequence[Any] | None = None,
    ) -> Tensor:
        """Score images (n, 3, h, w), with one prompt per row where there are any -> (n,)."""

    def __add__(self, other: "Reward") -> "WeightedSum":
        return WeightedSum([*_terms(self), *_terms(other)])

    def __mul__(self, weight: float) -> "WeightedSum":
        return WeightedSum([(weight * w, reward) for w, reward in _terms(self)])

    __rmul__ = __mul__


class WeightedSum(Reward):
    """`sum_i w_i reward_i`, differentiable where every term is."""

    def __init__(self, terms: Sequence[tuple[float, Reward]]) -> None:
        super().__init__()
        self.weights = [float(w) for w, _ in terms]
        self.rewards = nn.ModuleList(reward for _, reward in terms)
        self.differentiable = all(reward.differentiable for _, reward in terms)

    def forward(
        self,
        images: Tensor,
        prompts: Sequence[str] | None = None,
        metadata: Sequence[Any] | None = None,
    ) -> Tensor:
        """Return the weighted sum of the terms' scores, (n,)."""
        scores = [w * score(r, images, prompts, metadata) for w, r in _terms(self)]
        return torch.stack(scores).sum(0)


def _terms(reward: Reward) -> list[tuple[float, Reward]]:
    if not isinstance(reward, WeightedSum):
        return [(1.0, reward)]
    return [(w, r) for w, r in zip(reward.weights, reward.rewards, strict=True)]  # type: ignore[misc]


def term_scores(
    reward: Reward, images: Tensor, prompts: Sequence[str] | None = None
) -> dict[str, Tensor]:
    """Score each term of a weighted sum by itself, unweighted: name -> (n,).

    >>> light, dark = wrap(lambda x: x.mean((1, 2, 3))), wrap(lambda x: -x.mean((1, 2, 3)))
    >>> {k: v.item() for k, v in term_scores(light + dark, torch.ones(1, 3, 2, 2)).items()}
    {'<lambda>': 1.0, '<lambda> 2': -1.0}
    """
    out: dict[str, Tensor] = {}
    for _, term in _terms(reward):
        name = title = name_of(term)
        count = 2
        while title in out:
            title, count = f"{name} {count}", count + 1
        out[title] = score(term, images, prompts)
    return out


def name_of(reward: Reward) -> str:
    """Return what people call a reward."""
    source = reward if "__name__" in vars(reward) else getattr(reward, "f", reward)
    return getattr(source, "__name__", type(source).__name__)


class _Wrapped(Reward):
    """A callable as a reward."""

    def __init__(self, f: Callable[..., Tensor], differentiable: bool) -> None:
        super().__init__()
        self.f, self.differentiable = f, differentiable
        self._arity = _positional(f)

    def forward(
        self,
        images: Tensor,
        prompts: Sequence[str] | None = None,
        metadata: Sequence[Any] | None = None,
    ) -> Tensor:
        """Call the function with as many of (images, prompts, metadata) as it takes."""
        return self.f(*(images, prompts, metadata)[: self._arity])


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


def wrap(f: Callable[..., Tensor], differentiable: bool = True) -> Reward:
    """Make a reward of any callable `f(images)` or `f(images, prompts)`.

    A reward stays as it is, unless it is to be taken as not differentiable.

    Args:
        f: takes images (n, 3, h, w) and, if it wants them, one prompt a row; returns (n,).
        differentiable: say False where the scores carry no gradient to the images.

    Raises:
        TypeError: `f` is not callable, or needs more arguments than a reward has.
    """
    if isinstance(f, Reward) and (differentiable or not f.differentiable):
        return f
    if not callable(f):
        raise TypeError(f"a reward is a callable on images, got {type(f).__name__}")
    return _Wrapped(f, differentiable)


def score(
    reward: Reward,
    images: Tensor,
    prompts: Sequence[str] | None = None,
    metadata: Sequence[Any] | None = None,
) -> Tensor:
    """Call a reward and check that it gave one number per image, (n,).

    Raises:
        ValueError: the reward returned something else; the message says what.
    """
    scores = reward(images, prompts, metadata)
    name = name_of(reward)
    if not isinstance(scores, Tensor):
        raise ValueError(
            f"reward {name!r} returned {type(scores).__name__}: return a tensor of shape (n,)"
        )
    if scores.shape != images.shape[:1]:
        raise ValueError(
            f"reward {name!r} returned shape {tuple(scores.shape)} for {len(images)} images: "
            f"return one number per image, shape ({len(images)},), not reduced over the batch"
        )
    return scores


def clamp01(images: Tensor) -> Tensor:
    """Clamp to [0, 1] with the gradient passed straight through.

    The true gradient is zero outside, and would strand pixels there.
    """
    return images + (images.clamp(0, 1) - images).detach()


class LinearReward(Reward):
    """`reward(x) = a . x` on vectors (n, d): `GaussianMixture.tilt` has its tilt, theory (42)."""

    def __init__(self, a: Tensor) -> None:
        super().__init__()
        self.register_buffer("a", torch.as_tensor(a))
        self.a: Tensor

    def forward(self, images: Tensor, prompts: Any = None, metadata: Any = None) -> Tensor:
        """Return `x @ a`, (n,)."""
        return images @ self.a.to(images)


class QuadraticReward(Reward):
    """`reward(x) = -1/2 (x - c)^T P (x - c)` on vectors (n, d).

    `GaussianMixture.tilt` knows its tilt, theory (43).

    Args:
        centre: c, (d,).
        precision: P, symmetric and positive semi-definite, (d, d).
    """

    def __init__(self, centre: Tensor, precision: Tensor) -> None:
        super().__init__()
        self.register_buffer("centre", torch.as_tensor(centre))
        self.register_buffer("precision", torch.as_tensor(precision))
        self.centre: Tensor
        self.precision: Tensor

    def forward(self, images: Tensor, prompts: Any = None, metadata: Any = None) -> Tensor:
        """Return `-1/2 (x - c)^T P (x - c)`, (n,)."""
        z = images - self.centre.to(images)
        return -0.5 * ((z @ self.precision.to(images)) * z).sum(-1)
