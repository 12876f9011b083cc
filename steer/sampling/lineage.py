"""Diagnostics of a weighted population: uneven weights, and descent from few starts.

The probability that none of k independent starts leads to a mode of mass m is `(1 - m)^k`. Here k
is smaller than the number of particles: only particles with a weight that is not negligible count,
and only starts that still have descendants, because resampling copies some particles and drops
others.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from steer.guidance.resampler import ess

__all__ = ["FEW", "collapses", "doubts", "lineages"]

FEW = 2.0
"""There is a warning for fewer effective particles or starts than this. With 2, a mode that holds
half of the mass is missed in a quarter of all runs."""

MANY = 16
"""With fewer particles, an ESS below two during the run is not remarkable."""

LEAST = 4
"""With fewer particles there are no warnings: their number is obviously too small."""


def lineages(log_w: Tensor, ancestors: Tensor) -> Tensor:
    """Return the effective number of starts that the weight descends from, (p,).

    `1 / Σ_a V_a²` with `V_a` the share of the weight that descends from start a: between 1 and the
    effective sample size.

    >>> float(lineages(torch.zeros(1, 4), torch.tensor([[0, 0, 3, 3]])))
    2.0

    Args:
        log_w: log-weights (p, n).
        ancestors: the start of each particle, (p, n).
    """
    shares = log_w.double().softmax(-1)
    each = torch.zeros_like(shares).scatter_add_(-1, ancestors.to(shares.device), shares)
    return 1 / each.square().sum(-1)


def doubts(log_w: Tensor, ancestors: Tensor, prompts: Sequence[str] | None = None) -> list[str]:
    """Return the reasons to doubt a weighted population, one sentence each; none for a sound one.

    The absence of warnings proves nothing: a mode that no start led to leaves no trace.

    Args:
        log_w: log-weights (p, n).
        ancestors: the start of each particle, (p, n).
        prompts: names of the populations.
    """
    n = log_w.shape[-1]
    if n < LEAST:
        return []
    sizes, starts = ess(log_w.double()), lineages(log_w, ancestors)
    uneven = sizes < FEW
    few = (starts < FEW) & ~uneven
    mend = "raise the temperature, or use more particles or steps"
    found = []
    if bool(uneven.any()):
        found.append(
            f"{_where(uneven, prompts)}nearly all of the weight is on "
            f"{float(sizes[uneven].min()):.1f} of {n} particles (ESS): log Z and weighted means "
            f"depend on these only, and modes may be missing; {mend}"
        )
    if bool(few.any()):
        found.append(
            f"{_where(few, prompts)}the remaining particles descend from "
            f"{float(starts[few].min()):.1f} of {n} starts: with so few, a mode with half of the "
            f"mass is missed in more than a quarter of all runs; {mend}"
        )
    return found


def collapses(
    weighed: Tensor, left: Tensor, n: int, prompts: Sequence[str] | None = None
) -> list[str]:
    """Return a sentence if a step resampled weights that were nearly all on one particle.

    Resampling hides this, because the following particles are copies with equal weights. Uneven
    weights during the run that are not resampled lose nothing.

    Args:
        weighed: the effective sample size before each step's resampling, (steps, p).
        left: the effective sample size after it, (steps, p).
        n: number of particles of a population.
        prompts: names of the populations.
    """
    if n < MANY or not len(weighed):
        return []
    low, step = weighed.where(left > weighed + 0.5, float(n)).min(0)
    these = low < FEW
    if not bool(these.any()):
        return []
    worst = int(low.argmin())
    return [
        f"{_where(these, prompts)}at step {int(step[worst]) + 1} of {len(weighed)} the weights "
        f"collapsed to {float(low[worst]):.1f} of {n} particles (ESS): all others are copies of "
        "them; raise the temperature, or use more particles or steps"
    ]


def _where(these: Tensor, prompts: Sequence[str] | None) -> str:
    """Name the affected prompts: the first, and the number of others."""
    places = these.nonzero().flatten().tolist()
    if prompts is None or len(these) == 1:
        return ""
    others = f" and {len(places) - 1} more of {len(these)}" if len(places) > 1 else ""
    return f"prompt {prompts[places[0]]!r}{others}: "
