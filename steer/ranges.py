"""Checks of numerical arguments: out of range, infinite, or not a number."""

import math
import operator
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "above",
    "all_finite",
    "between",
    "count",
    "finite",
    "not_negative",
    "number",
    "symmetric",
    "within",
]


def number(name: str, value: Any) -> float:
    """Return a value if it is a number.

    Raises:
        ValueError: it is not a number, but for instance a text or a list.
    """
    try:
        math.isfinite(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a number, got {value!r}") from None
    return value


def finite(name: str, value: float) -> float:
    """Return a number that is neither infinite nor NaN.

    Raises:
        ValueError: it is infinite or NaN; the message names it.
    """
    if not math.isfinite(number(name, value)):
        raise ValueError(f"{name} must be a finite number, got {value}")
    return value


def above(name: str, value: float, why: str = "") -> float:
    """Return a finite number above zero.

    Raises:
        ValueError: it is none; `why` ends the message.
    """
    if not (number(name, value) > 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be above zero and finite, got {value}{why}")
    return value


def not_negative(name: str, value: float, why: str = "") -> float:
    """Return a finite number that is zero or above.

    Raises:
        ValueError: it is none; `why` ends the message.
    """
    if not 0 <= number(name, value) < math.inf:
        raise ValueError(f"{name} must not be negative nor infinite, got {value}{why}")
    return value


def within(name: str, value: float, low: float, high: float) -> float:
    """Return a number in [low, high].

    Raises:
        ValueError: it is outside, or NaN.
    """
    if not low <= number(name, value) <= high:
        raise ValueError(f"{name} must be in [{low:g}, {high:g}], got {value}")
    return value


def between(name: str, value: float, low: float, high: float) -> float:
    """Return a number in (low, high), excluding both ends.

    Raises:
        ValueError: it is outside, or NaN.
    """
    if not low < number(name, value) < high:
        raise ValueError(f"{name} must be between {low:g} and {high:g}, got {value}")
    return value


def count(name: str, value: Any, least: int = 1) -> int:
    """Return a whole number that is at least `least`.

    Raises:
        ValueError: it is less, or not a whole number.
    """
    try:
        whole = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be a whole number, got {value!r}") from None
    if whole < least:
        low = f"be at least {least}" if least else "not be negative"
        raise ValueError(f"{name} must {low}, got {value}")
    return whole


def all_finite(name: str, values: Tensor) -> Tensor:
    """Return a tensor whose numbers are all finite.

    Raises:
        ValueError: one is not; the message says which.
    """
    bad = (~torch.isfinite(values)).nonzero()
    if len(bad):
        place = bad[0].tolist()
        raise ValueError(
            f"{name} must be finite numbers, got {values[tuple(place)].item()}"
            + (f" at {place}" if place else "")
        )
    return values


def symmetric(name: str, matrices: Tensor) -> Tensor:
    """Return matrices (..., d, d) that equal their transposes, to rounding.

    Raises:
        ValueError: one does not; the message says where the difference is largest.
    """
    off = (matrices - matrices.mT).abs()
    if float(off.max()) > 1e-5 * float(matrices.abs().max()):
        *_, i, j = [int(k) for k in torch.unravel_index(off.argmax(), off.shape)]
        raise ValueError(
            f"{name} must be symmetric: entries [{i}, {j}] and [{j}, {i}] differ by "
            f"{float(off.max()):.3g}; take (a + a.mT) / 2 if that is what is meant"
        )
    return matrices
