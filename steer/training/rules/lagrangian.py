"""Lagrangian rules: `∂_t X(s,t,x) = b_t(X(s,t,x))`, theory (6). The end moves.

With `X = x + (t-s) v`, `∂_t X = v + (t-s) ∂_t v`: one derivative in time, none in space.
"""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from steer.objectives.regression import lagrangian_error
from steer.path import like
from steer.training.rules.base import Field, Look, Rule
from steer.training.rules.tangent import normalised, towards

__all__ = ["LMD", "LSD", "TVM", "AlignLagrangian", "Heun"]

WHY = (
    "a Lagrangian rule needs the velocity at X(s,t,x), and no pair of noise and data is known "
    'whose path passes there, so the velocity of a pair cannot be used: follow "own" or a '
    "teacher's"
)


class _Lagrangian(Rule):
    family: ClassVar[Literal["Lagrangian"]] = "Lagrangian"

    def allow(self, field: Field) -> None:
        """Raise an error for the pair's velocity, which is not defined at X(s,t,x)."""
        if field == "conditional":
            raise ValueError(f"velocity='conditional': {WHY}")
        super().allow(field)


class LSD(_Lagrangian):
    """`e = ∂_t X(s,t,x) - sg[v(X, t, t)]`: Lagrangian self-distillation, theory (64).

    Rule: Lagrangian. Target: the network's own velocity at the end. Stopped: that velocity and the
        point where it is evaluated. Boffi, Albergo, Vanden-Eijnden 2025, arXiv 2505.18825.
    """

    target = "∂_t X on v(X,t,t)"
    stopped = "the velocity"
    source = "Boffi et al. 2025, 2505.18825"
    fails = "high frequencies in the network's time embedding make ∂_t v noisy"
    cost = 10

    def error(self, look: Look) -> Tensor:
        """Return `∂_t X - sg[b(X)]`."""
        end, rate = _end(look)
        with torch.no_grad():
            b = look.follow(self.field)(end.detach(), look.t)
        return rate - b


class LMD(LSD):
    """`e = ∂_t X(s,t,x) - b_t(X(s,t,x))`, b a teacher's: Lagrangian map distillation, theory (64).

    Rule: Lagrangian. Target: the teacher's velocity at the end. Stopped: nothing, the gradient
    passes through the teacher's argument. Boffi et al. 2024, arXiv 2406.07507.
    """

    target = "∂_t X on the teacher's b(X)"
    stopped = "nothing"
    source = "Boffi et al. 2024, 2406.07507"
    fails = "as lsd; a step also differentiates the teacher"
    cost = 9
    field: Field = "teacher"

    def error(self, look: Look) -> Tensor:
        """Return `∂_t X - b(X)`."""
        end, rate = _end(look)
        return rate - look.follow(self.field)(end, look.t)


class TVM(_Lagrangian):
    """`e = ∂_t X(s,t,x) - sg[v̄(X, t, t)]`, v̄ the running average: theory (64).

    Rule: Lagrangian. Target: the average's velocity at the end, at gaps that are often long.
    Stopped: that velocity. Terminal velocity matching, 2025, arXiv 2511.19797.
    """

    target = "∂_t X on the average's v̄(X,t,t)"
    stopped = "the velocity"
    source = "terminal velocity matching 2025, 2511.19797"
    fails = (
        "as lsd; transformers need RMS norms and an attention that supports "
        "forward-mode derivatives"
    )
    cost = 10
    asks = False
    pairs = "gaps"

    def error(self, look: Look) -> Tensor:
        """Return `∂_t X - sg[v̄(X)]`."""
        end, rate = _end(look)
        with torch.no_grad():
            b = look.target.velocity(end.detach(), look.t)
        return rate - b


class AlignLagrangian(_Lagrangian):
    """`e = v - sg[v + g]`, `g = N(b(X) - ∂_t X)`: Align Your Flow's Lagrangian form, theory (64).

    Rule: Lagrangian. Target: the teacher's velocity at the end. Stopped: all but v, so that the
    derivative needs no gradient. N divides by |g| + .1. Sabour, Fidler, Kreis 2025,
    arXiv 2506.14603.
    """

    target = "v on v + N(b(X) - ∂_t X)"
    stopped = "all but v"
    source = "Sabour et al. 2025, 2506.14603"
    fails = "its authors found it unstable on real images"
    cost = 6
    field: Field = "teacher"

    def error(self, look: Look) -> Tensor:
        """Return `v - sg[v + g]`."""
        with torch.no_grad():
            end, rate = _end(look)
            g = normalised(look.follow(self.field)(end, look.t) - rate)
        return towards(look.flow.mean_velocity(look.x, look.s, look.t), g)


class Heun(_Lagrangian):
    """`e = (X(s,t,x) - X*) / (t-s)`, X* one Heun step from X̄(s,t-h,x): theory (13, 14).

    Rule: Lagrangian, in discrete form: no derivative of the network is taken. Target: the running
    average's map at t - h, carried on by the velocity. Stopped: all of it. Fixed point: off by
    O(h²). Boffi et al. 2024, arXiv 2406.07507, in continuous time.

    Args:
        low: the step h is uniform between low and high.
        high: cut at t - s.
    """

    target = "X on a Heun step of b from X̄(s,t-h,x)"
    stopped = "the target"
    source = "discrete form of Boffi et al. 2024, 2406.07507"
    fails = (
        "its target contains the error of the averaged network: it converges slowly at t = 1, "
        "and pixel noise is left there"
    )
    cost = 8
    derives = False
    field: Field = "teacher"

    def __init__(self, low: float = 0.03, high: float = 0.13) -> None:
        self.low, self.high = low, high

    def error(self, look: Look) -> Tensor:
        """Return `(X - X*) / (t-s)`."""
        h = self.low + (self.high - self.low) * look.uniform
        b = look.follow(self.field)
        return lagrangian_error(look.flow, look.target, b, look.x, (look.s, look.t), h)


def _end(look: Look) -> tuple[Tensor, Tensor]:
    """Return `X(s,t,x)` and `∂_t X = v + (t-s) ∂_t v`."""
    v, dv = look.along(None, 0.0, 1.0)
    gap = like(look.t - look.s, look.x)
    return look.x + gap * v, v + gap * dv
