"""The times of a training step: laws of a time, and of a pair of times s < t."""

from collections.abc import Callable, Mapping

import torch
from torch import Generator, Tensor

from steer.names import unknown

__all__ = ["PAIRS", "Pairs", "draw_pair", "draw_time", "pairs_named"]

Pairs = Callable[[int, Generator], tuple[Tensor, Tensor]]
"""(n, generator) -> s (n,) and t (n,), 0 <= s < t <= 1."""

LEVELS = 7
"""Gaps of the dyadic grid: 1, 1/2, ... 1/64."""


def draw_time(n: int, generator: Generator, uniform: float = 0.2) -> Tensor:
    """Sample n times: `sigmoid(N(-1/2, 1))`, and a fraction `uniform` of uniform ones (n,)."""
    bell = torch.sigmoid(torch.randn(n, generator=generator) - 0.5)
    flat = torch.rand(n, generator=generator)
    return torch.where(torch.rand(n, generator=generator) < uniform, flat, bell)


def draw_pair(n: int, generator: Generator, ends: float = 0.35) -> tuple[Tensor, Tensor]:
    """Sample n pairs s < t, uniform on the triangle; a share `ends` has s = 0, as many t = 1."""
    s, t = triangle(n, generator)
    s = torch.where(torch.rand(n, generator=generator) < ends, 0.0, s)
    t = torch.where(torch.rand(n, generator=generator) < ends, 1.0, t)
    return s, t


def triangle(n: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Sample n pairs uniform on the triangle 0 <= s < t <= 1 (Boffi et al. 2025, 2505.18825)."""
    s, t = torch.rand(n, 2, generator=generator).sort(1).values.unbind(1)
    return s, t


def logit_normal(n: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Sample two times `1 - sigmoid(N(-0.4, 1))`, sorted (Geng et al. 2025, 2505.13447).

    In the paper time runs from data to noise, here from noise to data.
    """
    s, t = torch.sigmoid(0.4 - torch.randn(n, 2, generator=generator)).sort(1).values.unbind(1)
    return s, t


def gaps(n: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Draw s from `1 - sigmoid(N(-0.4, 1))`, and t a share `1 - sigmoid(N(-0.8, 1))` of the way
    from s to 1: long gaps are frequent (terminal velocity matching, 2511.19797).
    """  # noqa: D205
    z = torch.randn(n, 2, generator=generator)
    s = torch.sigmoid(0.4 - z[:, 0])
    return s, s + (1 - s) * torch.sigmoid(0.8 - z[:, 1])


def to_the_end(n: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Sample s by `draw_time`, with t = 1, for consistency models."""
    return draw_time(n, generator), torch.ones(n)


def half_to_the_end(n: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Sample pairs of the triangle, half of them with t = 1 (AnyFlow)."""
    s, t = triangle(n, generator)
    return s, torch.where(torch.rand(n, generator=generator) < 0.5, 1.0, t)


def dyadic(n: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Sample a gap of 1, 1/2, ... 1/64, and s a multiple of it (shortcut models, 2410.12557)."""
    gap = 0.5 ** torch.randint(LEVELS, (n,), generator=generator).float()
    places = (torch.rand(n, generator=generator) / gap).floor()
    return places * gap, (places + 1) * gap


PAIRS: Mapping[str, Pairs] = {
    "ends": draw_pair,
    "triangle": triangle,
    "logit-normal": logit_normal,
    "gaps": gaps,
    "dyadic": dyadic,
    "to-the-end": to_the_end,
    "half-to-the-end": half_to_the_end,
}
"""Name -> law of the pair (s, t)."""


def pairs_named(pairs: str | Pairs) -> Pairs:
    """Return a law of pairs by its name.

    Raises:
        ValueError: an unknown name, with the nearest one.
    """
    if callable(pairs):
        return pairs
    if pairs not in PAIRS:
        raise unknown("law of pairs", pairs, PAIRS)
    return PAIRS[pairs]
