"""Means with standard errors, distances, and tables of measurements."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Estimate", "estimate", "markdown", "pairwise_distance", "rate"]


class Estimate(NamedTuple):
    """A mean and its standard error; None if the data do not give one.

    >>> print(Estimate(0.5, 0.01), Estimate(0.5, None), Estimate(None, None))
    0.5000 ± 0.0100 0.5000 –
    """

    mean: float | None
    error: float | None

    def __str__(self) -> str:
        if self.mean is None:
            return "–"
        digits = 4 if abs(self.mean) < 10 else 2
        beside = "" if self.error is None else f" ± {self.error:.{digits}f}"
        return f"{self.mean:.{digits}f}{beside}"


def estimate(values: Tensor) -> Estimate:
    """Return the mean of independent values (n,) and its standard error; NaNs are left out.

    >>> estimate(torch.tensor([1.0, 3.0, torch.nan]))
    Estimate(mean=2.0, error=1.0)
    """
    known = values[~values.isnan()].double()
    if not len(known):
        return Estimate(None, None)
    error = float(known.std()) / math.sqrt(len(known)) if len(known) > 1 else None
    return Estimate(float(known.mean()), error)


def rate(hits: Tensor | Sequence[bool]) -> Estimate:
    """Return the fraction of hits (n,) and its binomial standard error.

    >>> rate([True, False, True, False])
    Estimate(mean=0.5, error=0.25)
    """
    known = torch.as_tensor(hits).double()
    if not len(known):
        return Estimate(None, None)
    share = float(known.mean())
    return Estimate(share, math.sqrt(share * (1 - share) / len(known)))


def pairwise_distance(features: Tensor) -> float:
    """Return the mean Euclidean distance over the pairs of rows (n, d); NaN for a single row.

    >>> pairwise_distance(torch.tensor([[0.0, 0.0], [3.0, 4.0]]))
    5.0
    """
    return float(torch.pdist(features.float()).mean()) if len(features) > 1 else math.nan


def markdown(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a table in Markdown.

    >>> print(markdown(["a", "b"], [["x", 1]]))
    | a | b |
    |---|---|
    | x | 1 |
    """
    lines = [list(header), *([str(cell) for cell in row] for row in rows)]
    text = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([text[0], "|" + "---|" * len(header), *text[1:]])
