"""What a weighted population tells: how uneven it is, and from how few starts it descends.

A mode of the tilt that holds a share m of its mass has no descendant of k independent starts with
probability `(1 - m)^k`. Of n particles some k count: those whose weight is not negligible, and of
the starts those that still have descendants, because resampling copies some and drops others.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from steer.guidance.resampler import ess

__all__ = ["FEW", "collapses", "doubts", "lineages"]

FEW = 2.0
"""Fewer effective particles or starts than this are said: with 2, a mode that holds half of the
mass is missed in a quarter of all runs."""

MANY = 16
"""Of fewer particles an ESS below two on the way is no news."""

LEAST = 4
"""Of fewer particles nothing is said: their number speaks for itself."""


def lineages(log_w: Tensor, ancestors: Tensor) -> Tensor:
    """Return how many starts the weight descends from, effectively, (p,).

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
    """Return what speaks against a weighted population, a sentence each; none of a sound one.

    That nothing is said proves nothing: a mode that no start led to leaves no trace.

    Args:
        log_w: log-weights (p, n).
        ancestors: the start of each particle, (p, n).
        prompts: what to call the populations.
    """
    n = log_w.shape[-1]
    if n < LEAST:
        return []
    sizes, starts = ess(log_w.double()), lineages(log_w, ancestors)
    uneven = sizes < FEW
    few = (starts < FEW) & ~uneven
    mend = "raise the temperature, or take more particles or steps"
    found = []
    if bool(uneven.any()):
        found.append(
            f"{_where(uneven, prompts)}nearly all of the weight is on "
            f"{float(sizes[uneven].min()):.1f} of {n} particles (ESS): log Z and weighted means "
            f"rest on these, and modes may be missing; {mend}"
        )
    if bool(few.any()):
        found.append(
            f"{_where(few, prompts)}what is left descends from {float(starts[few].min()):.1f} of "
            f"{n} starts: a mode that holds half of the mass is missed so in more than one run "
            f"of four; {mend}"
        )
    return found


def collapses(
    weighed: Tensor, left: Tensor, n: int, prompts: Sequence[str] | None = None
) -> list[str]:
    """Return a sentence where a step resampled weights that were nearly all on one particle.

    Resampling hides it: the particles that follow are copies, and have equal weights again.
    Weights that are uneven on the way and are not resampled lose nothing.

    Args:
        weighed: the effective sample size before each step's resampling, (steps, p); the last
            step's is `doubts`'.
        left: the effective sample size after it, (steps, p).
        n: how many particles a population has.
        prompts: what to call the populations.
    """
    on_the_way = weighed[:-1].where(left[:-1] > weighed[:-1] + 0.5, float(n))
    if n < MANY or not len(on_the_way):
        return []
    low, step = on_the_way.min(0)
    these = low < FEW
    if not bool(these.any()):
        return []
    worst = int(low.argmin())
    return [
        f"{_where(these, prompts)}at step {int(step[worst]) + 1} of {len(weighed)} the weights "
        f"collapsed onto {float(low[worst]):.1f} of {n} particles (ESS): all others are their "
        "copies; raise the temperature, or take more particles or steps"
    ]


def _where(these: Tensor, prompts: Sequence[str] | None) -> str:
    """Name the prompts that are meant: the first, and how many others."""
    places = these.nonzero().flatten().tolist()
    if prompts is None or len(these) == 1:
        return ""
    others = f" and {len(places) - 1} more of {len(these)}" if len(places) > 1 else ""
    return f"prompt {prompts[places[0]]!r}{others}: "
