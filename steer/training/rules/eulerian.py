"""Eulerian rules: `∂_s X + ∇X·b_s(x) = 0`, theory (8). The start moves.

With `X = x + (t-s) v` it reads `v = b + (t-s) d`, `d = ∂_s v + ∇v·b`: the derivative of v along
the flow at the start. b enters linearly and at x itself, so the pair's velocity, whose mean is b,
can be used instead.
"""

import math
from typing import ClassVar, Literal

import torch
from torch import Tensor

from steer.path import like
from steer.training.rules.base import Field, Look, Rule
from steer.training.rules.tangent import normalised, towards, warmed

__all__ = ["EMD", "ESD", "AlphaFlow", "AnyFlow", "ImprovedMeanFlow", "MeanFlow", "Tangent"]


class _Eulerian(Rule):
    family: ClassVar[Literal["Eulerian"]] = "Eulerian"


class ESD(_Eulerian):
    """`e = ∂_s X + sg[∇X·b_s(x)]`, b = v(x,s,s): Eulerian self-distillation, theory (65).

    Rule: Eulerian. Target: zero. Stopped: b and the whole derivative in space. Boffi et al. 2025,
    arXiv 2505.18825.
    """

    target = "∂_s X + ∇X·b on zero"
    stopped = "b and ∇X·b"
    source = "Boffi et al. 2025, 2505.18825"
    fails = "unstable: the derivative in space is multiplied by large early gradients"
    cost = 10

    def error(self, look: Look) -> Tensor:
        """Return `-v + (t-s) ∂_s v + sg[b + (t-s) ∇v·b]`."""
        b, gap = look.velocity(self.field), like(look.t - look.s, look.x)
        v, in_time = look.along(None, 1.0, 0.0)
        with torch.no_grad():
            in_space = look.along(b, 0.0, 0.0)[1]
        return gap * in_time - v + b + gap * in_space


class EMD(_Eulerian):
    """`e = ∂_s X + ∇X·b_s(x)`, b a teacher's: Eulerian map distillation, theory (65).

    Rule: Eulerian. Target: zero. Stopped: nothing. Boffi et al. 2024, arXiv 2406.07507.
    """

    target = "∂_s X + ∇X·b on zero"
    stopped = "nothing"
    source = "Boffi et al. 2024, 2406.07507"
    fails = "the gradient passes through ∇X: slow, and noisy on images"
    cost = 7
    field: Field = "teacher"

    def error(self, look: Look) -> Tensor:
        """Return `-v + b + (t-s) d`."""
        b = look.velocity(self.field)
        v, d = look.along(b, 1.0, 0.0)
        return b - v + like(look.t - look.s, look.x) * d


class MeanFlow(_Eulerian):
    """`e = v - sg[b + (t-s) d]`, b the pair's velocity: MeanFlow, theory (66).

    Rule: Eulerian. Target: the pair's velocity and the derivative of v along it. Stopped: the
    target. Geng et al. 2025, arXiv 2505.13447.
    """

    target = "v on x' + (t-s) d"
    stopped = "the target"
    source = "Geng et al. 2025, 2505.13447"
    fails = "noisy: the derivative is taken along the velocity of one (noise, data) pair"
    cost = 4
    field: Field = "conditional"
    weight = "adaptive"

    def error(self, look: Look) -> Tensor:
        """Return `v - sg[b + (t-s) d]`."""
        b = look.velocity(self.field)
        with torch.no_grad():
            d = look.along(b, 1.0, 0.0)[1]
        goal = b + like(look.t - look.s, look.x) * d
        return look.flow.mean_velocity(look.x, look.s, look.t) - goal


class ImprovedMeanFlow(_Eulerian):
    """`e = v - (t-s) sg[d] - x'`, d along the network's own velocity: improved MeanFlow, (66).

    Rule: Eulerian. Target: the pair's velocity x', or a teacher's. Stopped: the derivative, which
    is along `v(x,s,s)` and so has no noise of the pair's. Geng et al. 2025, arXiv 2512.02012.
    """

    target = "v - (t-s) d on x'"
    stopped = "the derivative"
    source = "Geng et al. 2025, 2512.02012"
    fails = "none known at this size"
    cost = 5
    field: Field = "conditional"
    weight = "adaptive"

    def error(self, look: Look) -> Tensor:
        """Return `v - (t-s) sg[d] - b`."""
        with torch.no_grad():
            d = look.along(look.velocity("own"), 1.0, 0.0)[1]
        v = look.flow.mean_velocity(look.x, look.s, look.t)
        return v - like(look.t - look.s, look.x) * d - look.velocity(self.field)


class AnyFlow(ImprovedMeanFlow):
    """Improved MeanFlow with d by central differences, half of the pairs to the end: (66).

    Rule: Eulerian. Target: as imf, from the pair or a guided teacher. Stopped: the derivative.
    It works where no layer knows forward derivatives. Half of a batch is on the diagonal and a
    quarter has t = 1. AnyFlow, 2026, as SimpleTuner's documentation gives its numbers: diffusion
    .5, consistency .25, difference .005.
    """

    target = "v - (t-s) d on x', d by differences"
    source = "AnyFlow 2026; SimpleTuner's documentation"
    fails = "finite differences lose their precision with bfloat16 weights"
    cost = 6
    pairs = "half-to-the-end"
    differenced = True


class Tangent(_Eulerian):
    """`e = v - sg[v + g]`, `g = N(b - v + r (t-s) d)`: bounded tangents, theory (66).

    Rule: Eulerian. Target: as MeanFlow's. Stopped: all but v. N divides by |g| + .1; r goes from 0
    to 1 over the first tenth of the run. With t = 1 it is the continuous consistency model (Lu,
    Song 2024, arXiv 2410.11081), from data or from a teacher; with all pairs and a teacher Align
    Your Flow (Sabour et al. 2025, arXiv 2506.14603).

    Args:
        field: which velocity b is.
        pairs: "to-the-end" for a consistency model.
        warm: share of the run over which r grows.
    """

    target = "v on v + N(b - v + (t-s) d)"
    stopped = "all but v"
    source = "Lu, Song 2024, 2410.11081; Sabour et al. 2025, 2506.14603"
    fails: str = "only jumps to t = 1 are trained: several steps need re-noising"
    cost = 6

    def __init__(self, field: Field = "teacher", pairs: str = "ends", warm: float = 0.1) -> None:
        self.field, self.pairs, self.warm = field, pairs, warm
        if pairs != "to-the-end":
            self.fails = "slow: the tangents have bounded length, however large the error is"

    def error(self, look: Look) -> Tensor:
        """Return `v - sg[v + g]`."""
        b = look.velocity(self.field)
        with torch.no_grad():
            v, d = look.along(b, 1.0, 0.0)
            r = warmed(look.progress, self.warm)
            g = normalised(b - v + r * like(look.t - look.s, look.x) * d)
        return towards(look.flow.mean_velocity(look.x, look.s, look.t), g)


class AlphaFlow(MeanFlow):
    """`e = (v - sg[a x' + (1-a) v̄(x + (m-s) x', m, t)]) / sqrt(a)`, `m = s + a (t-s)`.

    Theory (67). Rule: Eulerian in the limit a = 0, where it is MeanFlow; flow matching along the
    path at a = 1.
    a falls from 1 to 0 by a sigmoid of the run's progress. Target: as said, v̄ the network without
    gradient. Stopped: the target. alpha-Flow 2025, arXiv 2510.20771.

    Args:
        begin: progress at which a leaves 1.
        end: progress at which it arrives at 0.
        steepness: of the sigmoid.
    """

    target = "v on a x' + (1-a) v(x + a (t-s) x', s + a (t-s), t)"
    source = "alpha-Flow 2025, 2510.20771"
    fails = (
        "its schedule spends many steps at large a, where the target is not yet that of the map"
    )

    def __init__(self, begin: float = 0.0, end: float = 0.7, steepness: float = 25.0) -> None:
        self.begin, self.end, self.steepness = begin, end, steepness

    def alpha(self, progress: float) -> float:
        """Return a at a progress: 1, then a sigmoid, then 0."""
        middle = (self.begin + self.end) / 2
        a = 1 / (1 + math.exp(min(50.0, self.steepness * (progress - middle))))
        return 1.0 if a > 0.95 else 0.0 if a < 0.05 else a

    def error(self, look: Look) -> Tensor:
        """Return the discrete error at a > 0, MeanFlow's at a = 0."""
        a = self.alpha(look.progress)
        if a == 0:
            return super().error(look)
        b = look.velocity(self.field)
        m = look.s + a * (look.t - look.s)
        with torch.no_grad():
            there = look.x + like(m - look.s, look.x) * b
            goal = a * b + (1 - a) * look.flow.mean_velocity(there, m, look.t) if a < 1 else b
        return (look.flow.mean_velocity(look.x, look.s, look.t) - goal) / a**0.5
