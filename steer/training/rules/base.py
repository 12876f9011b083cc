"""What a rule is: an error whose mean square, over data, is zero only for the flow map."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from steer.flow import FlowMap
from steer.objectives.regression import Velocity
from steer.training.rules.along import How, along

__all__ = ["Field", "Look", "Rule"]

Field = Literal["conditional", "own", "teacher"]
"""Which velocity b a rule follows: of the pair, `alpha' x_0 + beta' x_1`, which is b in the mean
alone; the network's own diagonal; a frozen teacher's."""


@dataclass(frozen=True)
class Look:
    """What a rule sees of one batch.

    Attributes:
        flow: the trained map, prompts bound.
        target: its running average, prompts bound; no gradient goes there.
        own: `(x, t) -> v(x,t,t)` of the trained map, without gradient.
        teacher: `(x, t) -> b`, guided; None where there is none.
        x: points `x_s` of the path, (n, *event).
        pair: the velocity of the pair that x lies between, (n, *event), guided; its mean given x
            is b.
        s: starts, (n,).
        t: ends, (n,).
        uniform: one number in [0, 1) a row, (n,), for what a rule draws.
        progress: of the run, from 0 to 1.
        how: derivatives by "jvp" or by "difference".
    """

    flow: FlowMap
    target: FlowMap
    own: Velocity
    teacher: Velocity | None
    x: Tensor
    pair: Tensor
    s: Tensor
    t: Tensor
    uniform: Tensor
    progress: float
    how: How

    def velocity(self, field: Field) -> Tensor:
        """Return b at (x, s) by a field, without gradient, (n, *event)."""
        if field == "conditional":
            return self.pair
        with torch.no_grad():
            return self.follow(field)(self.x, self.s)

    def follow(self, field: Field) -> Velocity:
        """Return the velocity of a field, at any point: never the pair's, which has but one."""
        if field == "own":
            return self.own
        if self.teacher is None:
            raise ValueError("this rule follows a teacher: give one, the frozen velocity")
        return self.teacher

    def along(self, dx: Tensor | None, ds: float, dt: float) -> tuple[Tensor, Tensor]:
        """Return v(x,s,t) and its derivative along (dx, ds, dt), with gradient."""
        return along(self.flow, self.x, self.s, self.t, (dx, ds, dt), self.how)


class Rule(ABC):
    """A training rule of a flow map `X(s,t,x) = x + (t-s) v(x,s,t)`.

    Attributes:
        family: "Lagrangian", "Eulerian" or "semigroup".
        target: what is regressed on what, in a line.
        stopped: what no gradient passes through.
        field: which velocity it follows.
        chosen: whether it was set by the caller; else a rule of the pair follows a teacher, where
            one is: the diagonal does.
        pairs: the law of (s, t) of its paper, see `steer.training.rules.times`.
        weight: how its errors are weighed, see `steer.training.rules.weights`.
        diagonal: share of a batch that is flow matching at s = t.
        cost: forward evaluations of the network that a step takes, a backward pass counted as two
            (Dieleman, "Learning the integral of a diffusion model", 2026).
        derives: whether it takes a derivative of the network.
        differenced: whether that is a difference whatever the network can do.
        fails: where it is known to fail.
        source: authors, year, arXiv id.
    """

    family: ClassVar[Literal["Lagrangian", "Eulerian", "semigroup"]]
    target: ClassVar[str]
    stopped: ClassVar[str]
    source: ClassVar[str]
    fails: str
    cost: ClassVar[int]
    derives: ClassVar[bool] = True
    differenced: ClassVar[bool] = False
    field: Field = "own"
    chosen: bool = False
    pairs: str = "ends"
    weight: str = "uniform"
    diagonal: float = 0.5

    @abstractmethod
    def error(self, look: Look) -> Tensor:
        """Return e, (n, *event): the loss is its mean square. In the units of a velocity."""

    def follows(self, field: Field | None) -> "Rule":
        """Return the rule with another field, where it allows it; None: its own.

        Raises:
            ValueError: the field is not allowed here; says why.
        """
        if field is not None:
            self.allow(field)
            self.field, self.chosen = field, True
        return self

    def led_by(self, teacher: object) -> None:
        """Raise where the rule follows a teacher and there is none."""
        if self.field == "teacher" and teacher is None:
            raise ValueError(
                f"{type(self).__name__} follows a teacher: give the frozen flow that it is to "
                'follow, let it follow its own velocity, rule.follows("own"), or choose a rule '
                "that needs none (lsd, imf, psd-m)"
            )

    asks: ClassVar[bool] = True
    """Whether its error asks for a velocity; else a choice of one would do nothing."""

    def allow(self, field: Field) -> None:
        """Raise where a field would lead to another fixed point, or would do nothing."""
        if not self.asks and field != self.field:
            raise ValueError(
                f"velocity={field!r}: {type(self).__name__} asks for no velocity off the "
                "diagonal, so that this would do nothing; what the diagonal follows is the "
                "recipe's `teacher`"
            )
