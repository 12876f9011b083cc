"""Rewards that combine rewards: minimum, product of experts, a cap, ensembles, micro-batches.

Sums are `0.7 * a + 0.3 * b`. In texts these are functions: `min(clip, brightness)`,
`capped(clip, at=0.3)`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rewards.gradient import with_gradient
from steer.reward import Reward, score, sharing, wrap

__all__ = ["Batched", "Capped", "Composed", "Ensemble", "Minimum", "Product"]


class Composed(Reward):
    """A reward that combines other rewards: define `join` of their scores (k, n)."""

    def __init__(self, *rewards: Reward | Callable[..., Tensor]) -> None:
        super().__init__()
        if not rewards:
            raise ValueError(f"{type(self).__name__.lower()} needs a reward")
        self.rewards = nn.ModuleList(wrap(reward) for reward in rewards)
        self.differentiable = all(reward.differentiable for _, reward in self.terms)

    @property
    def terms(self) -> list[tuple[float, Reward]]:
        """The rewards that it combines."""
        return [(1.0, reward) for reward in self.rewards]  # type: ignore[misc]

    def join(self, scores: Tensor) -> Tensor:
        """Combine several scores into one, (k, n) -> (n,)."""
        raise NotImplementedError("abstract: return one score per row")

    def forward(
        self,
        images: Tensor,
        prompts: Sequence[str] | None = None,
        metadata: Sequence[Any] | None = None,
    ) -> Tensor:
        """Score images (n, 3, h, w) -> (n,)."""
        with sharing():
            scores = [score(r, images, prompts, metadata) for _, r in self.terms]
        return self.join(torch.stack(scores))


class Minimum(Composed):
    """The smallest of several rewards, `min_i r_i`, or a smooth minimum of width w.

    `-w log sum_i exp(-r_i / w)`, which is below the minimum by at most `w log k`. The hard minimum
    has only the gradient of the smallest reward. Normalise rewards with different units first.

    Args:
        *rewards: rewards with the same units.
        smooth: w, in their units; 0: the hard minimum.

    Raises:
        ValueError: no rewards, or a negative width.
    """

    def __init__(self, *rewards: Reward | Callable[..., Tensor], smooth: float = 0.0) -> None:
        super().__init__(*rewards)
        if not smooth >= 0:
            raise ValueError(f"smooth must not be negative, got {smooth}")
        self.smooth = float(smooth)

    def join(self, scores: Tensor) -> Tensor:
        """Return the minimum, (k, n) -> (n,)."""
        if not self.smooth:
            return scores.amin(0)
        return -self.smooth * torch.logsumexp(-scores / self.smooth, 0)


class Product(Composed):
    """A product of experts: the log-probability that all of them accept (Hinton 2002).

    `sum_i log sigmoid((r_i - at_i) / width_i)`, in (-inf, 0): an expert far above its `at` adds
    nothing more, and one far below it contributes linearly. (The product of Gibbs experts `exp(r_i
    / tau_i)` is the weighted sum `1/tau_1 * a + 1/tau_2 * b`.)

    Args:
        *rewards: the experts.
        at: the reward at which each accepts with probability 1/2, in its units; one number for
            all, or one each.
        width: width of the transition, in its units; one number for all, or one each.

    Raises:
        ValueError: no rewards, not one number each, or a width that is not above zero.
    """

    def __init__(
        self,
        *rewards: Reward | Callable[..., Tensor],
        at: float | Sequence[float] = 0.0,
        width: float | Sequence[float] = 1.0,
    ) -> None:
        super().__init__(*rewards)
        for name, given in (("at", at), ("width", width)):
            numbers = [given] * len(rewards) if isinstance(given, int | float) else list(given)
            if len(numbers) != len(rewards):
                raise ValueError(
                    f"{len(numbers)} numbers for {name} and {len(rewards)} experts: give one for "
                    "all, or one each"
                )
            if name == "width" and not all(number > 0 for number in numbers):
                raise ValueError(f"width must be above zero, got {given}")
            self.register_buffer(name, torch.tensor(numbers, dtype=torch.float32)[:, None], False)
        self.at: Tensor
        self.width: Tensor

    def join(self, scores: Tensor) -> Tensor:
        """Return the sum of log-probabilities, (k, n) -> (n,)."""
        return F.logsigmoid((scores - self.at.to(scores)) / self.width.to(scores)).sum(0)


class Capped(Composed):
    """`min(r, at)`: a reward that does not grow beyond a target.

    Args:
        reward: what is capped.
        at: the target, in its units.
        soft: width of a smooth corner, `at - soft log(1 + exp((at - r) / soft))`; 0: a hard one,
            whose gradient is zero beyond the target.

    Raises:
        ValueError: a negative width.
    """

    def __init__(
        self, reward: Reward | Callable[..., Tensor], at: float, soft: float = 0.0
    ) -> None:
        super().__init__(reward)
        if not soft >= 0:
            raise ValueError(f"soft must not be negative, got {soft}")
        self.at, self.soft = float(at), float(soft)

    def join(self, scores: Tensor) -> Tensor:
        """Return the capped score, (1, n) -> (n,)."""
        if not self.soft:
            return scores[0].clamp(max=self.at)
        return self.at - self.soft * F.softplus((self.at - scores[0]) / self.soft)


class Ensemble(Composed):
    """The mean of rewards minus their disagreement, `mean_i r_i - penalty std_i r_i`.

    Errors of a single model are not confirmed by the others (Coste et al. 2023, arXiv 2310.02743:
    mean, worst case and uncertainty-weighted ensembles; the worst case is `Minimum`).

    Args:
        *rewards: rewards with the same units.
        penalty: weight of the standard deviation over the members (population, without Bessel's
            correction).

    Raises:
        ValueError: no rewards, or a negative penalty.
    """

    def __init__(self, *rewards: Reward | Callable[..., Tensor], penalty: float = 0.0) -> None:
        super().__init__(*rewards)
        if not penalty >= 0:
            raise ValueError(f"penalty must not be negative, got {penalty}")
        self.penalty = float(penalty)

    def join(self, scores: Tensor) -> Tensor:
        """Return the mean minus the penalty, (k, n) -> (n,)."""
        mean = scores.mean(0)
        if not self.penalty:
            return mean
        variance = (scores - mean).square().mean(0)
        # smoothed where all agree: the derivative of the square root is infinite there
        return mean - self.penalty * ((variance + 1e-12).sqrt() - 1e-6)


class Batched(Composed):
    """A reward in micro-batches: the memory of `size` rows, the same scores and gradients.

    If a gradient is needed, it is computed together with the score, chunk by chunk, and stored
    instead of the chunk's graph: no forward call is repeated. There are no second derivatives.

    Args:
        reward: one that scores each row independently.
        size: maximum number of rows per call.

    Raises:
        ValueError: a size below one.
    """

    def __init__(self, reward: Reward | Callable[..., Tensor], size: int) -> None:
        super().__init__(reward)
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"size must be a whole number above zero, got {size!r}")
        self.size = size

    def forward(
        self,
        images: Tensor,
        prompts: Sequence[str] | None = None,
        metadata: Sequence[Any] | None = None,
    ) -> Tensor:
        """Score images (n, 3, h, w) -> (n,)."""
        ((_, reward),) = self.terms

        def call(x: Tensor, a: int) -> Tensor:
            rows = slice(a, a + len(x))
            return score(
                reward,
                x,
                None if prompts is None else list(prompts[rows]),
                None if metadata is None else list(metadata[rows]),
            )

        chunks = [(images[a : a + self.size], a) for a in range(0, len(images), self.size)]
        if not (images.requires_grad and torch.is_grad_enabled() and self.differentiable):
            return torch.cat([call(x, a) for x, a in chunks])
        scores, gradients = [], []
        for chunk, a in chunks:
            x = chunk.detach().requires_grad_()
            part = call(x, a)
            found = None
            if part.requires_grad:
                (found,) = torch.autograd.grad(part.sum(), x, allow_unused=True)
            scores.append(part.detach())
            gradients.append(torch.zeros_like(x) if found is None else found)
        return with_gradient(images, torch.cat(scores), torch.cat(gradients))
