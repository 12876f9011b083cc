"""What a reward is: a module that gives one number a sample, higher is better.

>>> darkness = wrap(lambda images: -images.mean((1, 2, 3)))
>>> (0.5 * darkness + 2 * darkness)(torch.ones(2, 3, 4, 4))
tensor([-2.5000, -2.5000])
"""

import inspect
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "LinearReward",
    "QuadraticReward",
    "Reward",
    "WeightedSum",
    "clamp01",
    "dissect",
    "learners",
    "leaves",
    "name_of",
    "score",
    "shared",
    "sharing",
    "term_gradients",
    "term_scores",
    "wrap",
]


class Reward(nn.Module):
    """A reward: images (n, 3, h, w) as `FlowMap.decode` gives them -> scores (n,).

    Never reduced over the batch, higher is better, in whatever units are natural. Rewards add and
    scale: `0.7 * a + 0.3 * b` is a reward.

    Attributes:
        differentiable: whether the scores carry a gradient to the images.
        terms: what a reward is composed of, with weights where it is a weighted sum; itself alone
            where it is not composed.
    """

    differentiable: bool = True

    @property
    def terms(self) -> "list[tuple[float, Reward]]":
        """What the reward is composed of: (weight, reward), one pair for one that is not."""
        return [(1.0, self)]

    @abstractmethod
    def forward(
        self,
        images: Tensor,
        prompts: Sequence[str] | None = None,
        metadata: Sequence[Any] | None = None,
    ) -> Tensor:
        """Score images (n, 3, h, w), with one prompt per row where there are any -> (n,)."""

    def __add__(self, other: "Reward") -> "WeightedSum":
        return WeightedSum([*_summands(self), *_summands(other)])

    def __mul__(self, weight: float) -> "WeightedSum":
        return WeightedSum([(weight * w, reward) for w, reward in _summands(self)])

    __rmul__ = __mul__


class WeightedSum(Reward):
    """`sum_i w_i reward_i`, differentiable where every term is."""

    def __init__(self, terms: Sequence[tuple[float, Reward]]) -> None:
        super().__init__()
        self.weights = [float(w) for w, _ in terms]
        self.rewards = nn.ModuleList(reward for _, reward in terms)
        self.differentiable = all(reward.differentiable for _, reward in terms)

    @property
    def terms(self) -> list[tuple[float, Reward]]:
        """The summands with their weights."""
        return list(zip(self.weights, self.rewards, strict=True))  # type: ignore[arg-type]

    def forward(
        self,
        images: Tensor,
        prompts: Sequence[str] | None = None,
        metadata: Sequence[Any] | None = None,
    ) -> Tensor:
        """Return the weighted sum of the terms' scores, (n,)."""
        with sharing():
            scores = [w * score(r, images, prompts, metadata) for w, r in self.terms]
        return torch.stack(scores).sum(0)


def _summands(reward: Reward) -> list[tuple[float, Reward]]:
    return reward.terms if isinstance(reward, WeightedSum) else [(1.0, reward)]


_SHARED: ContextVar[dict[Any, Any] | None] = ContextVar("shared", default=None)


@contextmanager
def sharing() -> Iterator[None]:
    """Let the rewards called within share what they compute of the same images: see `shared`."""
    if _SHARED.get() is not None:
        yield
        return
    token = _SHARED.set({})
    try:
        yield
    finally:
        _SHARED.reset(token)


def shared(owner: Any, images: Tensor, make: Callable[[], Tensor]) -> Tensor:
    """Return `make()`, computed once per owner and images within one `sharing()`.

    Two rewards on one backbone ask it for the features of the same pictures; a sum of them
    encodes the pictures once. Outside of `sharing` nothing is remembered.

    Args:
        owner: what computes, say the backbone.
        images: what it computes on, the very tensor.
        make: the computation.
    """
    memory = _SHARED.get()
    if memory is None:
        return make()
    version = 0 if images.is_inference() else images._version
    key = id(owner), id(images), version, torch.is_grad_enabled()
    if key not in memory:
        memory[key] = owner, images, make()  # owner and images live on, so their ids stay theirs
    return memory[key][2]


def leaves(reward: Reward) -> list[Reward]:
    """Return the rewards that a composed one ends in, from left to right."""
    if [r for _, r in reward.terms] == [reward]:
        return [reward]
    return [leaf for _, term in reward.terms for leaf in leaves(term)]


def term_scores(
    reward: Reward, images: Tensor, prompts: Sequence[str] | None = None
) -> dict[str, Tensor]:
    """Score each reward that a composed one ends in, by itself, unweighted: name -> (n,).

    >>> light, dark = wrap(lambda x: x.mean((1, 2, 3))), wrap(lambda x: -x.mean((1, 2, 3)))
    >>> {k: v.item() for k, v in term_scores(light + dark, torch.ones(1, 3, 2, 2)).items()}
    {'<lambda>': 1.0, '<lambda> 2': -1.0}
    """
    with sharing():
        return {
            name: score(term, images, prompts) for name, term in _titled(leaves(reward)).items()
        }


def _titled(rewards: Sequence[Reward]) -> dict[str, Reward]:
    """Give each a name of its own: the second of a name is 'name 2'."""
    out: dict[str, Reward] = {}
    for reward in rewards:
        name = title = name_of(reward)
        count = 2
        while title in out:
            title, count = f"{name} {count}", count + 1
        out[title] = reward
    return out


def term_gradients(
    reward: Reward, images: Tensor, prompts: Sequence[str] | None = None
) -> dict[str, Tensor]:
    """Return what each leaf contributes to the gradient: name -> norm a row, (n,).

    `|d total / d s_i * d s_i / d images|` with s_i the leaf's score: for a weighted sum,
    `w_i |d s_i / d images|`. Leaves without a gradient are left out.

    >>> light = wrap(lambda x: x.mean((1, 2, 3)))
    >>> term_gradients(2.0 * light, torch.ones(1, 3, 2, 2))["<lambda>"] * 12**0.5
    tensor([2.0000])
    """
    out = {}
    for name, leaf in _titled(leaves(reward)).items():
        if not leaf.differentiable:
            continue
        x = images.detach().requires_grad_()
        with torch.enable_grad():
            total = _only(reward, leaf, x, prompts)
            (gradient,) = torch.autograd.grad(total.sum(), x, allow_unused=True)
        out[name] = (
            torch.zeros_like(total) if gradient is None else gradient.flatten(1).norm(dim=1)
        )
    return out


def dissect(
    reward: Reward,
    images: Tensor,
    prompts: Sequence[str] | None = None,
    batch_size: int = 64,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return `term_scores` and `term_gradients` of a composed reward; nothing of one that is not.

    Args:
        reward: the reward.
        images: (n, 3, h, w).
        prompts: one a row, or None.
        batch_size: the most rows of one call.
    """
    if len(leaves(reward)) < 2:
        return {}, {}
    scores, gradients = [], []
    for a in range(0, len(images), batch_size):
        rows = slice(a, a + batch_size)
        asked = None if prompts is None else prompts[rows]
        with torch.no_grad():
            scores.append(term_scores(reward, images[rows], asked))
        gradients.append(
            term_gradients(reward, images[rows], asked) if reward.differentiable else {}
        )
    scored, shares = (
        {k: torch.cat([part[k] for part in parts]) for k in parts[0]}
        for parts in (scores, gradients)
    )
    return scored, shares


def _only(reward: Reward, leaf: Reward, images: Tensor, prompts: Sequence[str] | None) -> Tensor:
    """Score by the whole reward, the gradient through one leaf alone."""
    others = [r for r in leaves(reward) if r is not leaf]
    hooks = [r.register_forward_hook(lambda module, args, scores: scores.detach()) for r in others]
    try:
        total = score(reward, images, prompts)
    finally:
        for hook in hooks:
            hook.remove()
    return total if total.requires_grad else total + 0 * images.flatten(1).sum(1)


def name_of(reward: Reward) -> str:
    """Return what people call a reward."""
    source = reward if "__name__" in vars(reward) else getattr(reward, "f", reward)
    return getattr(source, "__name__", type(source).__name__)


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


def learners(reward: Reward) -> list[Any]:
    """Return the parts that learn a scale from the scores of a run.

    They have `learned`, `update(reduce)` and `statistics`, as `rewards.algebra.Normalised` does,
    and take note of scores in training mode.
    """
    return [m for m in reward.modules() if hasattr(m, "learned") and hasattr(m, "statistics")]


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
