"""The next inverse temperature of a run, chosen so that the weights stay within a bound."""

import math
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from steer.flow import FlowMap, log_dtype, per_row
from steer.guidance.population import NOTHING
from steer.guidance.potential import Evaluation, Potential
from steer.names import unknown
from steer.path import Time, like

__all__ = ["BOUNDS", "Bound", "Tempered", "next_inverse"]

Bound = Literal["ess", "entropy"]

BOUNDS = ("ess", "entropy")
"""Measures of unequal weights: `ESS / n`, or the relative entropy to the uniform law."""


def next_inverse(
    log_w: Tensor, slope: Tensor, now: Tensor, least: float = 0.5, bound: str = "ess"
) -> Tensor:
    """Return the largest g in [now, 1] whose weights `log_w + (g - now) slope` keep a bound, (p,).

    With "ess", `ESS / n >= least`, which is the relative variance of the weights being at most
    `1 / least - 1`; with "entropy", `Σ W log(n W) <= -log(least)`, W the normalised weights. Both
    are 1, or 0, at equal weights (Jasra et al. 2011; Zhou, Johansen, Aston 2016, arXiv 1303.3123).
    n counts the particles that have a reward at all (`NOTHING`: none). By bisection, in float64
    where the device has it, without a value leaving the device. If the weights already violate the
    bound, g is not changed.

    Args:
        log_w: log-weights so far, (p, n).
        slope: their derivative in g, (p, n): the reward over its temperature.
        now: g so far, (p,).
        least: the smallest share, in (0, 1).
        bound: one of `BOUNDS`.

    Raises:
        ValueError: an unknown bound.
    """
    if bound not in BOUNDS:
        raise unknown("bound", bound, BOUNDS)
    kind = log_dtype(log_w.device)
    log_w, slope, now = log_w.to(kind), slope.to(kind), now.to(kind)
    n = ((slope > NOTHING / 2) & (log_w > NOTHING / 2)).sum(1).clamp(min=1).to(kind)

    def kept(g: Tensor) -> Tensor:
        log_share = (log_w + (g - now)[:, None] * slope).log_softmax(1)
        share = log_share.exp()
        if bound == "ess":
            return 1 / share.square().sum(1) >= least * n
        # for weight zero, the normalised weight is 0 and its logarithm -inf
        spread = torch.where(share > 0, share * (log_share + n.log()[:, None]), 0.0)
        return spread.sum(1) <= -math.log(least)

    low, high = now, torch.ones_like(now)
    whole = kept(high)
    for _ in range(40):
        middle = (low + high) / 2
        good = kept(middle)
        low, high = torch.where(good, middle, low), torch.where(good, high, middle)
    return torch.where(whole, 1.0, low)


class Tempered(Potential):
    """`r_t = g R(view_t(x))`, with one g per prompt that is set from outside.

    The last evaluated rows are cached, so that they are not evaluated again after g was chosen.

    Args:
        potential: without a ramp.
        prompts: number of prompts.
        device: device of their rows.

    Attributes:
        g: (prompts,), initially 0.
    """

    def __init__(
        self, potential: Potential, prompts: int, device: torch.device | None = None
    ) -> None:
        self.potential = potential
        self.temperature, self.prompts = potential.temperature, potential.prompts
        self.differentiable = potential.differentiable
        kind = log_dtype(device or torch.device("cpu"))
        self.g = torch.zeros(prompts, dtype=kind, device=device)
        self._last: tuple[Tensor, float, Evaluation] | None = None

    def predicts(self, flow: FlowMap, t: float) -> bool:
        """Return what the potential inside says."""
        return self.potential.predicts(flow, t)

    def whole(self, x: Tensor, t: Time, derivatives: bool = False) -> Evaluation:
        """Return the evaluation at g = 1."""
        last = self._last
        same = last is not None and last[0] is x and last[1] == float(t)
        if same and last is not None and (not derivatives or last[2].gradient is not None):
            return last[2]
        seen = self.potential.evaluate(x, t, derivatives)
        self._last = x, float(t), seen
        return seen

    def evaluate(self, x: Tensor, t: Time, derivatives: bool = False) -> Evaluation:
        """Evaluate the inner potential, times g."""
        seen = self.whole(x, t, derivatives)
        g = per_row(self.g, len(x))
        gradient = None if seen.gradient is None else like(g, x) * seen.gradient
        return replace(
            seen, value=g.to(seen.value) * seen.value, gradient=gradient, partial=None, total=None
        )
