"""`State`: rows at one time with all values computed for them, passed from step to step."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from steer.batches import Batched, in_batches, join_rows
from steer.flow import FlowMap, Wrapped
from steer.guidance.population import NOTHING
from steer.guidance.potential import Evaluation, Potential
from steer.path import Time

__all__ = ["BatchedPotential", "KnownFlow", "State"]


def _dropped(seen: Evaluation) -> Evaluation:
    """Give rows that are not finite a value of `NOTHING`, a reward of -inf and a zero gradient."""
    bad = ~torch.isfinite(seen.value)
    gradient = seen.gradient
    if gradient is not None:
        bad = bad | ~torch.isfinite(gradient.flatten(1).sum(1))
        wide = bad.reshape(-1, *[1] * (gradient.ndim - 1))
        gradient = gradient.masked_fill(wide, 0)

    def filled(values: Tensor | None, by: float) -> Tensor | None:
        return None if values is None else values.masked_fill(bad, by)

    return replace(
        seen,
        value=seen.value.masked_fill(bad, NOTHING),
        reward=seen.reward.masked_fill(bad, -torch.inf),
        gradient=gradient,
        partial=filled(seen.partial, 0.0),
        total=filled(seen.total, NOTHING),
    )


class State:
    """Rows at one time, and what has been computed for them.

    Evaluation, velocity and score are each computed once, on first use, and are kept when rows are
    selected or resampled.

    Args:
        x: rows, (n, *event).
        t: where they are.
        flow: computes velocity and score.
        potential: computes evaluations.
    """

    def __init__(self, x: Tensor, t: float, flow: FlowMap, potential: Potential) -> None:
        self.x, self.t, self.flow, self.potential = x, t, flow, potential
        self._seen: Evaluation | None = None
        self._velocity: Tensor | None = None
        self._score: Tensor | None = None
        self._jump: tuple[float, Tensor] | None = None

    def at(self, x: Tensor, t: float) -> "State":
        """Return other rows, for which nothing has been computed yet."""
        return State(x, t, self.flow, self.potential)

    def evaluation(self, derivatives: bool = False) -> Evaluation:
        """Return the potential's evaluation, with its gradient if `derivatives`."""
        if self._seen is None or (derivatives and self._seen.gradient is None):
            self._seen = self.potential.evaluate(self.x, self.t, derivatives)
        return self._seen

    @property
    def value(self) -> Tensor:
        """`r_t(x)`, (n,)."""
        return self.evaluation().value

    @property
    def velocity(self) -> Tensor:
        """`b_t(x)`, (n, *event)."""
        if self._velocity is None:
            d = self._prediction(self.t) if self.t < 1 else None
            if d is None:
                self._velocity = self.flow.velocity(self.x, self.t)
            else:
                self._velocity = self.flow.path.velocity_of(self.x, d, self.t)
        return self._velocity

    def jump(self, t: float) -> Tensor:
        """Return `X(s,t,x)`, computed once.

        It takes no network call if an evaluation has made the only one that is needed.
        """
        if self._jump is not None and self._jump[0] == float(t):
            return self._jump[1]
        d = self._prediction(t)
        if d is None:
            y = self.flow.jump(self.x, self.t, t)
        else:
            y = self.flow.path.carried(self.x, d, self.t, t)
        self._jump = float(t), y
        return y

    def _prediction(self, t: float) -> Tensor | None:
        """Return the prediction of the data from which a jump to t follows, if it is known."""
        seen = self._seen
        if seen is None or seen.clean is None:
            return None
        flow = self.flow
        while isinstance(flow, Batched | KnownFlow):  # which change none of its values
            flow = flow.flow
        known = flow.reuses(self.t, t) and self.potential.predicts(flow, self.t)
        return seen.clean if known else None

    @property
    def score(self) -> Tensor:
        """`s_t(x)`, (n, *event): computed from the velocity if the flow has no closed form."""
        if self._score is None:
            if self.flow.derives("score") and self.flow.derives("denoise"):
                path = self.flow.path
                d = path.denoised(self.x, self.velocity, self.t)
                self._score = path.score(self.x, d, self.t)
            else:
                self._score = self.flow.score(self.x, self.t)
        return self._score

    def rows(self, index: Tensor) -> "State":
        """Return only these rows, in this order, with all computed values."""
        return self._map(lambda v: v[index])

    def choose(self, accept: Tensor, other: "State") -> "State":
        """Return this state's rows where `accept`, (n,), and another's elsewhere."""

        def pick(a: Tensor, b: Tensor) -> Tensor:
            return torch.where(accept.reshape(-1, *[1] * (a.ndim - 1)), a, b)

        return self._map(pick, other)

    def _map(self, f: Callable[..., Tensor], *others: "State") -> "State":
        """Apply `f` to all known values of these states."""
        states = (self, *others)
        made = self.at(f(*(s.x for s in states)), self.t)
        seen, *rest = (s._seen for s in states)
        if seen is not None and all(e is not None for e in rest):
            made._seen = seen.map(f, *(e for e in rest if e is not None))
        for name in ("_velocity", "_score"):
            values = [getattr(s, name) for s in states]
            if all(v is not None for v in values):
                setattr(made, name, f(*values))
        return made

    def views(self) -> "tuple[FlowMap, Potential]":
        """Return flow and potential for a kernel: they reuse the known values of these rows.

        A kernel's `propose(x, s, t, potential, ...)` has no other access to them.
        """
        return KnownFlow(self), _KnownPotential(self)

    def learn_of(self, potential: Potential) -> "State":
        """Return this state, with the values that a kernel has computed through `views`."""
        noted = getattr(potential, "noted", None)
        if self._seen is None and noted is not None and self.is_of(*noted[:2]):
            self._seen = noted[2]
        return self

    def is_of(self, x: Tensor, t: Time) -> bool:
        """Return whether this state is for exactly these rows x at t."""
        scalar = not isinstance(t, Tensor) or t.ndim == 0
        return x is self.x and scalar and bool(t == self.t)


class KnownFlow(Wrapped):
    """The flow, with the values that are known for one state."""

    def __init__(self, state: State) -> None:
        super().__init__(state.flow)
        self._state = state

    def call(self, name: str, x: Tensor, *times: Time) -> Tensor:
        """Return the state's velocity or jump for its own rows, else that of the flow."""
        known = name in ("velocity", "jump") and self._state.is_of(x, times[0])
        if known and name == "velocity":
            return self._state.velocity
        if known and not isinstance(times[1], Tensor):
            return self._state.jump(times[1])
        return super().call(name, x, *times)

    def around(self, flow: FlowMap) -> Any:
        """Return another flow unchanged, because no values are known for it."""
        return self if flow is self.flow else flow

    def score(self, x: Tensor, t: Time) -> Tensor:
        """Return the state's score for its own rows, else that of the flow."""
        return self._state.score if self._state.is_of(x, t) else super().score(x, t)


class _KnownPotential(Potential):
    """The potential, which reuses the known values of one state."""

    def __init__(self, state: State) -> None:
        inner = state.potential
        self._state = state
        self.temperature, self.prompts = inner.temperature, inner.prompts
        self.differentiable = inner.differentiable
        self.noted: tuple[Tensor, Time, Evaluation] | None = None

    def predicts(self, flow: FlowMap, t: float) -> bool:
        return self._state.potential.predicts(flow, t)

    def evaluate(self, x: Tensor, t: Time, derivatives: bool = False) -> Evaluation:
        if self._state.is_of(x, t):
            return self._state.evaluation(derivatives)
        seen = self._state.potential.evaluate(x, t, derivatives)
        self.noted = x, t, seen
        return seen


class BatchedPotential(Potential):
    """A potential in micro-batches, with checked values.

    Args:
        potential: the potential.
        size: maximum number of rows in one call; None: all.
        prompts: number of prompts that its rows belong to.
        check: called with (name, numbers (n,)) of each evaluation.
        drop: whether rows with a reward or gradient that is not finite get weight zero, a value of
            `NOTHING`, instead of an error by `check`.
        eager: whether to compute the gradient with every value before t = 1.
    """

    def __init__(
        self,
        potential: Potential,
        size: int | None,
        prompts: int,
        check: Callable[[str, Tensor], None],
        eager: bool = False,
        drop: bool = False,
    ) -> None:
        self.potential, self.size, self.check, self.eager = potential, size, check, eager
        self.drop = drop
        self.count, self.prompts = prompts, potential.prompts
        self.differentiable, self.temperature = potential.differentiable, potential.temperature

    def predicts(self, flow: FlowMap, t: float) -> bool:
        """Return the potential's answer."""
        return self.potential.predicts(flow, t)

    def evaluate(self, x: Tensor, t: Time, derivatives: bool = False) -> Evaluation:
        """Evaluate part by part."""
        derivatives = derivatives or (self.eager and float(t) < 1)
        parts = in_batches(
            lambda part: self.potential.evaluate(part, t, derivatives), x, self.size, self.count
        )
        seen = parts[0].map(lambda *v: join_rows(v, self.count), *parts[1:])
        if self.drop:
            seen = _dropped(seen)
        strange = ~(seen.value.isfinite() | seen.reward.isfinite())  # as returned by the reward
        self.check("reward", torch.where(strange, seen.reward.to(seen.value), seen.value))
        if seen.gradient is not None:
            self.check("gradient", seen.gradient.flatten(1).sum(1))
        return seen
