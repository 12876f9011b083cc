"""Semigroup rules: `X(u,t,X(s,u,x)) = X(s,t,x)`, theory (7). Two short jumps teach a long one.

In mean velocities `v(x,s,t) = (1-h) v(x,s,u) + h v(X(s,u,x),u,t)`, `h = (t-u) / (t-s)`.
No derivative is taken; errors of short jumps add up in long ones.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from steer.path import like
from steer.training.rules.base import Field, Look, Rule

__all__ = ["PSD", "Progressive", "Shortcut", "SplitMeanFlow"]


class PSD(Rule):
    """`e = v(x,s,t) - sg[(1-h) v̄(x,s,u) + h v̄(X̄(s,u,x),u,t)]`: theory (68).

    Progressive self-distillation. Rule: semigroup. Target: the running average's two jumps.
    Stopped: the target. h is 1/2 ("midpoint") or uniform. Boffi et al. 2025, arXiv 2505.18825.

    Args:
        midpoint: h = 1/2, else uniform.
    """

    family: ClassVar[Literal["semigroup"]] = "semigroup"
    target = "v on the mean of two jumps of the average"
    stopped = "the target"
    source = "Boffi et al. 2025, 2505.18825"
    fails = "errors of short jumps add up in long ones"
    cost = 8
    derives = False
    asks: ClassVar[bool] = False

    def __init__(self, midpoint: bool = True) -> None:
        self.midpoint = midpoint

    def error(self, look: Look) -> Tensor:
        """Return `v - sg[(1-h) v̄ + h v̄]`."""
        h = torch.full_like(look.s, 0.5) if self.midpoint else look.uniform
        u = look.s + (1 - h) * (look.t - look.s)
        with torch.no_grad():
            goal = _two(look.target.mean_velocity, look, u)
        return look.flow.mean_velocity(look.x, look.s, look.t) - goal


def _two(v: Callable[[Tensor, Tensor, Tensor], Tensor], look: Look, u: Tensor) -> Tensor:
    """Return the mean velocity from s to t of two jumps by v, through u."""
    x, s, t = look.x, look.s, look.t
    first = v(x, s, u)
    second = v(x + like(u - s, x) * first, u, t)
    share = (t - u) / (t - s).clamp(min=1e-6)  # two sampled times may be equal
    return torch.lerp(first, second, like(share, x))


class Shortcut(PSD):
    """PSD's midpoint on dyadic gaps, three quarters of a batch flow matching: theory (68).

    Rule: semigroup. Stopped, and target: as psd-m. Shortcut models: Frans et al. 2024, arXiv
    2410.12557.
    """

    source = "Frans et al. 2024, 2410.12557"
    fails = "is trained at dyadic times only; errors of short jumps add up in long ones"
    pairs = "dyadic"
    diagonal = 0.75

    def __init__(self) -> None:
        super().__init__(midpoint=True)


class SplitMeanFlow(PSD):
    """PSD at a uniform split, the diagonal from a teacher: theory (68).

    Rule: semigroup. Stopped, and target: as psd-u; flow matching follows the guided teacher.
    SplitMeanFlow 2025, arXiv 2507.16884.
    """

    source = "SplitMeanFlow 2025, 2507.16884"
    cost = 9
    field: Field = "teacher"

    def __init__(self) -> None:
        super().__init__(midpoint=False)


class Progressive(PSD):
    """Two jumps of half the gap, with jump lengths that double during the run: theory (68).

    Rule: semigroup. Target: two jumps of the running average, at the shortest gap two Euler steps
    of the teacher. Stopped: the target. In the k-th part of a run the gaps are those up to the
    k-th of 1/64, 1/32, ... 1. Progressive distillation: Salimans, Ho 2022, arXiv 2202.00512;
    there each gap has its own network, here one network learns all gaps.
    """

    target = "v on the mean of two jumps, gap by gap"
    source = "Salimans, Ho 2022, 2202.00512"
    fails = "long jumps are trained last, and on top of the errors of the shorter ones"
    cost = 8
    asks: ClassVar[bool] = True
    field: Field = "teacher"
    pairs = "dyadic"
    shortest: ClassVar[float] = 2.0**-6

    def __init__(self) -> None:
        super().__init__(midpoint=True)

    def error(self, look: Look) -> Tensor:
        """Return the error of gaps, limited to the longest gap that the run has reached."""
        level = min(6, int(8 * look.progress))  # the whole range in the last quarter
        t = torch.minimum(look.t, look.s + self.shortest * 2**level)
        look = replace(look, t=t)
        u, b = (look.s + t) / 2, look.follow(self.field)
        with torch.no_grad():
            euler = _two(lambda x, s, _: b(x, s), look, u)
            short = like((t - look.s <= 1.01 * self.shortest).to(look.x), look.x)
            goal = torch.lerp(_two(look.target.mean_velocity, look, u), euler, short)
        return look.flow.mean_velocity(look.x, look.s, t) - goal
