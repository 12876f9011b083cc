"""Resamplers: log-weights (n,) and a generator -> indices of the survivors (n,).

All are unbiased: particle i has `n W_i` copies on average, `W = softmax(log_w)`, theory (36) of
docs/theory.md (Douc, Cappé, Moulines 2005, arXiv cs/0507025). A particle of weight zero never
survives.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = [
    "Resampler",
    "ess",
    "log_mean_exp",
    "multinomial",
    "residual",
    "stratified",
    "systematic",
]

Resampler = Callable[[Tensor, torch.Generator], Tensor]


def ess(log_w: Tensor) -> Tensor:
    """Return the effective sample size `(sum w)² / sum w²`, theory (35), along the last axis.

    >>> float(ess(torch.zeros(8)))
    8.0
    """
    return 1 / log_w.softmax(-1).square().sum(-1)


def log_mean_exp(log_w: Tensor) -> Tensor:
    """Return `log mean(exp(log_w))` along the last axis: a term of theory (37)."""
    return log_w.logsumexp(-1) - math.log(log_w.shape[-1])


def _invert(log_w: Tensor, points: Tensor) -> Tensor:
    """Return, for each point in [0, 1), the index whose share of [0, 1) contains it."""
    w = log_w.double().cpu().softmax(0)
    edges = w.cumsum(0)
    edges = edges / edges[-1]
    index = torch.searchsorted(edges, points, right=True)
    return index.clamp(max=int(w.nonzero()[-1])).to(log_w.device)


def _uniform(n: int, generator: torch.Generator) -> Tensor:
    return torch.rand(n, generator=generator, dtype=torch.float64)


def systematic(log_w: Tensor, generator: torch.Generator) -> Tensor:
    """Invert the weights at `(i + u) / n`, one u for all."""
    n = len(log_w)
    return _invert(log_w, (torch.arange(n) + _uniform(1, generator)) / n)


def stratified(log_w: Tensor, generator: torch.Generator) -> Tensor:
    """Invert the weights at `(i + u_i) / n`."""
    n = len(log_w)
    return _invert(log_w, (torch.arange(n) + _uniform(n, generator)) / n)


def multinomial(log_w: Tensor, generator: torch.Generator) -> Tensor:
    """Sample n independent indices with probabilities `softmax(log_w)`."""
    return _invert(log_w, _uniform(len(log_w), generator))


def residual(log_w: Tensor, generator: torch.Generator) -> Tensor:
    """Keep `floor(n W_i)` copies of each, and sample the rest from the remaining weights."""
    n = len(log_w)
    expected = n * log_w.double().cpu().softmax(0)
    copies = (expected + 1e-9).floor()
    kept = torch.repeat_interleave(torch.arange(n), copies.long())
    missing = n - len(kept)
    if missing == 0:
        return kept.to(log_w.device)
    rest = _invert((expected - copies).clamp(min=0).log(), _uniform(missing, generator))
    return torch.cat([kept, rest]).to(log_w.device)
