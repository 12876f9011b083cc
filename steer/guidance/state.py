"""What a run wraps around a flow, a reward and a potential; none of it changes a value.

Micro-batches, one evaluation per (x, t), and counts.
"""

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from steer.flow import FlowMap
from steer.guidance.potential import Evaluation, Potential
from steer.path import Time
from steer.sampling.counts import Counted

__all__ = ["SharedFlow", "SharedPotential"]


def _batched(f: Callable[..., Any], x: Tensor, prompts: int, size: int | None) -> list[Any]:
    """Apply f to micro-batches of `size` rows, as many (and at least one) of every prompt."""
    n = len(x) // prompts
    m = n if size is None else max(1, size // prompts)
    if n <= m:
        return [f(x)]
    grouped = x.unflatten(0, (prompts, n))
    return [f(grouped[:, a : a + m].flatten(0, 1)) for a in range(0, n, m)]


def _join(prompts: int) -> Callable[..., Tensor]:
    """Return the function that puts micro-batches together again."""

    def join(*parts: Tensor) -> Tensor:
        if len(parts) == 1:
            return parts[0]
        return torch.cat([p.unflatten(0, (prompts, -1)) for p in parts], 1).flatten(0, 1)

    return join


class SharedFlow(FlowMap):
    """A flow in micro-batches, that remembers its last velocity.

    Args:
        flow: the flow, prompts already bound.
        prompts: how many prompts its rows belong to.
        batch_size: the most rows in one network call; None: all.
    """

    def __init__(self, flow: FlowMap, prompts: int, batch_size: int | None) -> None:
        super().__init__()
        self.flow, self.prompts, self.batch_size = flow, prompts, batch_size
        self.path, self.event_shape = flow.path, flow.event_shape
        self._last: tuple[Tensor, Time, Tensor] | None = None

    def _batched(self, f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return _join(self.prompts)(*_batched(f, x, self.prompts, self.batch_size))

    def velocity(self, x: Tensor, t: Time) -> Tensor:
        """Return the velocity, evaluated once for the same x at the same time."""
        if self._last is None or self._last[0] is not x or self._last[1] != t:
            self._last = x, t, self._batched(lambda x: self.flow.velocity(x, t), x)
        return self._last[2]

    def jump(self, x: Tensor, s: Time, t: Time) -> Tensor:
        """Return the flow's jump."""
        return self._batched(lambda x: self.flow.jump(x, s, t), x)

    def denoise(self, x: Tensor, t: Time) -> Tensor:
        """Return the flow's own denoiser, sharing the velocity where it is made of it."""
        if self._source.denoise is not FlowMap.denoise:
            return self._batched(lambda x: self.flow.denoise(x, t), x)
        return super().denoise(x, t)

    def score(self, x: Tensor, t: Time) -> Tensor:
        """Return the flow's own score, sharing the velocity where it is made of it."""
        if self._source.score is not FlowMap.score:
            return self._batched(lambda x: self.flow.score(x, t), x)
        return super().score(x, t)

    @property
    def _source(self) -> type[FlowMap]:
        """The class of the flow below the counting."""
        return type(self.flow.flow if isinstance(self.flow, Counted) else self.flow)

    def log_prob(self, x: Tensor, t: Time = 1.0) -> Tensor | None:
        """Return the flow's log-density."""
        return self.flow.log_prob(x, t)

    def decode(self, x: Tensor) -> Tensor:
        """Return the flow's images."""
        return self._batched(self.flow.decode, x)


class SharedPotential(Potential):
    """A potential in micro-batches, that remembers its last evaluations and checks them.

    Args:
        potential: the potential.
        prompts: how many prompts its rows belong to.
        batch_size: the most rows in one call; None: all.
        derivatives: whether to take the gradient along whenever the value is asked for.
        check: called with (name, numbers (n,)) of each new evaluation.
    """

    def __init__(
        self,
        potential: Potential,
        prompts: int,
        batch_size: int | None,
        *,
        derivatives: bool,
        check: Callable[[str, Tensor], None],
    ) -> None:
        self.potential, self._rows, self.batch_size = potential, prompts, batch_size
        self.differentiable, self.temperature = potential.differentiable, potential.temperature
        self.prompts = potential.prompts
        self._derivatives, self._check = derivatives, check
        self._recent: deque[tuple[Tensor, Time, Evaluation]] = deque(maxlen=2)

    def known(self, x: Tensor, t: Time) -> Evaluation | None:
        """Return what is remembered of x at t: of the two ends of the step."""
        for at, time, evaluation in reversed(self._recent):
            if at is x and time == t:
                return evaluation
        return None

    def note(self, x: Tensor, t: Time, evaluation: Evaluation) -> None:
        """Remember an evaluation."""
        self._recent.append((x, t, evaluation))

    def evaluate(self, x: Tensor, t: Time, derivatives: bool = False) -> Evaluation:
        """Evaluate, once for the same x at the same time."""
        known = self.known(x, t)
        if known is not None and (known.gradient is not None or not derivatives):
            return known
        derivatives = derivatives or (self._derivatives and float(t) < 1)
        parts = _batched(
            lambda x: self.potential.evaluate(x, t, derivatives), x, self._rows, self.batch_size
        )
        seen = parts[0].map(_join(self._rows), *parts[1:])
        self._check("reward", seen.value)
        if seen.gradient is not None:
            self._check("gradient", seen.gradient.flatten(1).sum(1))
        self.note(x, t, seen)
        return seen
