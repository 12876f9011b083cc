"""Count network and reward calls, and their gradients, as they are made."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from steer.flow import FlowMap, Wrapped
from steer.path import Time
from steer.ranks import Ranks, counted, idle
from steer.reward import Reward, name_of

__all__ = ["Counted", "CountedReward", "Counts", "passes"]


@dataclass
class Counts:
    """Network and reward calls of a run, in rows: the terms of theory (51).

    In a run over several processes, each process has the counts of all: see `steer.ranks`.

    Attributes:
        forward: network evaluations.
        backward: network gradients with respect to the input.
        reward: reward evaluations.
        reward_gradient: reward gradients.
        bad: rewards that were not finite, if they are counted.
    """

    forward: int = 0
    backward: int = 0
    reward: int = 0
    reward_gradient: int = 0
    bad: Tensor | int = 0

    @property
    def nfe(self) -> int:
        """Network forward-equivalents, theory (51)."""
        return self.forward + self.backward

    @property
    def all_bad(self) -> float:
        """`bad`, summed over all processes."""
        ranks = Ranks.of_run()
        if ranks is None:
            return float(self.bad)
        return float(ranks.total(torch.as_tensor(self.bad, device=ranks.device)))


def _count_backward(y: Tensor, counts: Counts, name: str, each: int = 1) -> None:
    """Add y's rows, times `each`, to a count when a gradient passes through y."""
    if y.requires_grad:
        # without y itself, whose graph the hook would keep alive
        rows = counted(each * y.shape[:1].numel())

        def add(gradient: Tensor) -> None:
            setattr(counts, name, getattr(counts, name) + rows)

        y.register_hook(add)


def passes(y: Tensor) -> int:
    """Return the number of forward passes of y: two if a derivative was computed with it."""
    return 1 if forward_ad.unpack_dual(y).tangent is None else 2


class Counted(Wrapped):
    """A flow whose calls are counted: a jump, velocity, denoiser or score is one forward per row.

    Args:
        flow: the flow.
        counts: what is added to; views by `given` share it.
    """

    def __init__(self, flow: FlowMap, counts: Counts) -> None:
        super().__init__(flow)
        self.counts = counts

    @property
    def posterior_map(self) -> Any:
        """The posterior map of the inner flow; a sample counts as a network call."""
        inner = self.flow.posterior_map
        return None if inner is None else _CountedPosterior(inner, self.counts)

    def call(self, name: str, x: Tensor, *times: Time) -> Tensor:
        """Call the inner flow, and count."""
        y, each = super().call(name, x, *times), self.calls(name, *times)
        self.counts.forward += counted(each * len(y) * passes(y))
        _count_backward(y, self.counts, "backward", each)
        return y


class _CountedPosterior:
    """A posterior map whose samples are counted."""

    def __init__(self, posterior: Any, counts: Counts) -> None:
        self.posterior, self.counts = posterior, counts

    def sample(self, x: Tensor, t: Time, n: int, **given: Any) -> Tensor:
        y = self.posterior.sample(x, t, n, **given)
        self.counts.forward += counted(n * len(x))
        _count_backward(y, self.counts, "backward", len(x))
        return y


class CountedReward(Reward):
    """A reward whose calls and gradients are counted.

    Args:
        reward: the reward.
        counts: what is added to.
        bad: whether rewards that are not finite are counted, too.
    """

    def __init__(self, reward: Reward, counts: Counts, bad: bool = False) -> None:
        super().__init__()
        self.reward, self.counts, self.bad = reward, counts, bad
        self.differentiable = reward.differentiable
        self.__name__ = name_of(reward)

    def forward(
        self,
        images: Tensor,
        prompts: Sequence[str] | None = None,
        metadata: Sequence[Any] | None = None,
    ) -> Tensor:
        """Return the reward's scores, (n,)."""
        scores = self.reward(images, prompts, metadata)
        self.counts.reward += counted(len(images))
        if isinstance(scores, Tensor):
            if self.bad and not idle():  # on the device, so the host need not wait
                self.counts.bad = self.counts.bad + (~scores.detach().isfinite()).sum()
            _count_backward(scores, self.counts, "reward_gradient")
        return scores
