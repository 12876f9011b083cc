"""What a run wraps around a flow, a reward and a potential; none of it changes a value.

Micro-batches, one evaluation per (x, t), and counts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from steer.flow import FlowMap
from steer.path import Time
from steer.reward import Reward, name_of

__all__ = ["Counted", "CountedReward", "Counts"]


@dataclass
class Counts:
    """Network and reward calls of a run, in rows: what theory (51) adds up.

    Attributes:
        forward: network evaluations.
        backward: network gradients with respect to the input.
        reward: reward evaluations.
        reward_gradient: reward gradients.
    """

    forward: int = 0
    backward: int = 0
    reward: int = 0
    reward_gradient: int = 0


def _count_backward(y: Tensor, counts: Counts, name: str, each: int = 1) -> None:
    """Add y's rows to a count, `each` times, when a gradient passes through y."""
    if y.requires_grad:
        rows = each * y.shape[:1].numel()  # not y itself, whose graph the hook would keep alive

        def add(gradient: Tensor) -> None:
            setattr(counts, name, getattr(counts, name) + rows)

        y.register_hook(add)


class Counted(FlowMap):
    """A flow whose calls are counted: a jump, velocity, denoiser or score is one forward a row."""

    def __init__(self, flow: FlowMap, counts: Counts) -> None:
        super().__init__()
        self.flow, self.counts = flow, counts
        self.path, self.event_shape = flow.path, flow.event_shape
        self.evaluations = flow.evaluations

    def _count(self, y: Tensor) -> Tensor:
        self.counts.forward += self.evaluations * len(y)
        _count_backward(y, self.counts, "backward", self.evaluations)
        return y

    def velocity(self, x: Tensor, t: Time) -> Tensor:
        """Return the flow's velocity."""
        return self._count(self.flow.velocity(x, t))

    def jump(self, x: Tensor, s: Time, t: Time) -> Tensor:
        """Return the flow's jump."""
        return self._count(self.flow.jump(x, s, t))

    def denoise(self, x: Tensor, t: Time) -> Tensor:
        """Return the flow's own denoiser, from the velocity unless the flow has a closed form."""
        if type(self.flow).denoise is FlowMap.denoise:
            return super().denoise(x, t)
        return self._count(self.flow.denoise(x, t))

    def score(self, x: Tensor, t: Time) -> Tensor:
        """Return the flow's own score, from the denoiser unless the flow has a closed form."""
        if type(self.flow).score is FlowMap.score:
            return super().score(x, t)
        return self._count(self.flow.score(x, t))

    def log_prob(self, x: Tensor, t: Time = 1.0) -> Tensor | None:
        """Return the flow's log-density."""
        return self.flow.log_prob(x, t)

    def given(self, prompts: Sequence[str]) -> "Counted":
        """Bind prompts; the calls go to the same counts."""
        return Counted(self.flow.given(prompts), self.counts)

    def decode(self, x: Tensor) -> Tensor:
        """Return the flow's images."""
        return self.flow.decode(x)

    def encode(self, images: Tensor) -> Tensor:
        """Return what decodes to the images."""
        return self.flow.encode(images)


class CountedReward(Reward):
    """A reward whose calls and gradients are counted."""

    def __init__(self, reward: Reward, counts: Counts) -> None:
        super().__init__()
        self.reward, self.counts = reward, counts
        self.differentiable = reward.differentiable
        self.__name__ = name_of(reward)

    def forward(
        self,
        images: Tensor,
        prompts: Sequence[str] | None = None,
        metadata: Sequence[Any] | None = None,
    ) -> Tensor:
        """Return the reward's scores, (n,)."""
        self.counts.reward += len(images)
        scores = self.reward(images, prompts, metadata)
        if isinstance(scores, Tensor):
            _count_backward(scores, self.counts, "reward_gradient")
        return scores
