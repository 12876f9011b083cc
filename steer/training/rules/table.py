"""The rules by name; `steer.RULES` has one line for each."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from steer.catalogue import RULES
from steer.names import hint, unknown
from steer.training.rules.base import Rule
from steer.training.rules.eulerian import (
    EMD,
    ESD,
    AlphaFlow,
    AnyFlow,
    ImprovedMeanFlow,
    MeanFlow,
    Tangent,
)
from steer.training.rules.lagrangian import LMD, LSD, TVM, AlignLagrangian, Heun
from steer.training.rules.semigroup import PSD, Progressive, Shortcut, SplitMeanFlow

__all__ = ["RULES", "TABLE", "build"]

TABLE: Mapping[str, Callable[..., Rule]] = {
    "lsd": LSD,
    "lmd": LMD,
    "tvm": TVM,
    "ayf-lmd": AlignLagrangian,
    "heun": Heun,
    "esd": ESD,
    "emd": EMD,
    "meanflow": MeanFlow,
    "imf": ImprovedMeanFlow,
    "alphaflow": AlphaFlow,
    "anyflow": AnyFlow,
    "sct": lambda warm=0.1: Tangent("conditional", "to-the-end", warm),
    "scd": lambda warm=0.1: Tangent("teacher", "to-the-end", warm),
    "ayf": lambda warm=0.1: Tangent("teacher", "ends", warm),
    "psd-m": lambda: PSD(midpoint=True),
    "psd-u": lambda: PSD(midpoint=False),
    "shortcut": Shortcut,
    "splitmf": SplitMeanFlow,
    "progressive": Progressive,
}
"""Name -> makes the rule, from its options."""


def build(rule: str | Rule, options: Mapping[str, Any] | None = None) -> Rule:
    """Return a rule by its name and options; a rule is returned unchanged.

    Args:
        rule: a name of `RULES`.
        options: options of the rule, and `velocity`: "conditional", "own" or "teacher".

    Raises:
        ValueError: an unknown name or option, with the nearest ones; a velocity that the rule must
            not follow, with the reason.
    """
    if isinstance(rule, Rule):
        return rule
    if rule not in TABLE:
        raise unknown("rule", rule, TABLE)
    given = dict(options or {})
    field = given.pop("velocity", None)
    known = inspect.signature(TABLE[rule]).parameters
    for name in given:
        if name not in known:
            raise ValueError(
                f"rule {rule!r} takes no option {name!r}: {hint(name, known)}it takes "
                f"{', '.join(['velocity', *known])}"
            )
    return TABLE[rule](**given).follows(field)
