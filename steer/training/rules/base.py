"""The interface of rules: an error whose mean square over data is zero only for the flow map."""

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
"""The velocity b that a rule follows: that of the pair, `alpha' x_0 + beta' x_1`, which equals b
only in the mean; the network's own diagonal; that of a frozen teacher."""


@dataclass(frozen=True)
class Look:
    """The data of one batch that a rule uses.

    Attributes:
        flow: the trained map, prompts bound.
        target: its running average, prompts bound; no gradient goes there.
        own: `(x, t) -> v(x,t,t)` of the trained map, without gradient.
        teacher: `(x, t) -> b`, guided; None without a teacher.
        x: points `x_s` of the path, (n, *event).
        pair: the velocity of the pair that x lies between, (n, *event), guided; its mean given x
            is b.
        s: starts, (n,).
        t: ends, (n,).
        uniform: one number in [0, 1) per row, (n,), for random choices of a rule.
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
        """Return b at (x, s) from a field, without gradient, (n, *event)."""
        if field == "conditional":
            return self.pair
        with torch.no_grad():
            return self.follow(field)(self.x, self.s)

    def follow(self, field: Field) -> Velocity:
        """Return a field's velocity at any point; not the pair's, which is known at one point."""
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
        target: one line on what is regressed on what.
        stopped: the terms without a gradient.
        field: the velocity that it follows.
        chosen: whether the caller set the field. Otherwise a rule with the pair's velocity follows
            the teacher if there is one, as the diagonal does.
        pairs: the law of (s, t) in its paper, see `steer.training.rules.times`.
        weight: how its errors are weighted, see `steer.training.rules.weights`.
        diagonal: fraction of a batch that is flow matching at s = t.
        cost: forward evaluations of the network that a step takes, a backward pass counted as two
            (Dieleman, "Learning the integral of a diffusion model", 2026).
        derives: whether it takes a derivative of the network.
        differenced: whether that is always a finite difference.
        fails: known failures.
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
        """Return the rule with another field, if it allows that; None: its own.

        Raises:
            ValueError: the field is not allowed here; the message says why.
        """
        if field is not None:
            self.allow(field)
            self.field, self.chosen = field, True
        return self

    def led_by(self, teacher: object) -> None:
        """Raise an error if the rule follows a teacher and there is none."""
        if self.field == "teacher" and teacher is None:
            raise ValueError(
                f"{type(self).__name__} follows a teacher: give the frozen flow that it is to "
                'follow, let it follow its own velocity, rule.follows("own"), or choose a rule '
                "that needs none (lsd, imf, psd-m)"
            )

    asks: ClassVar[bool] = True
    """Whether its error uses a velocity; if not, the choice of one has no effect."""

    def allow(self, field: Field) -> None:
        """Raise an error if a field would lead to another fixed point, or have no effect."""
        if not self.asks and field != self.field:
            raise ValueError(
                f"velocity={field!r}: {type(self).__name__} asks for no velocity off the "
                "diagonal, so that this would do nothing; what the diagonal follows is the "
                "recipe's `teacher`"
            )
