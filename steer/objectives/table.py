"""The objectives of reward tuning by name."""

import inspect
import re
from collections.abc import Mapping
from typing import Any

from steer.catalogue import OBJECTIVES
from steer.names import hint, unknown
from steer.objectives.adjoint import Adjoint
from steer.objectives.amortise import Amortise
from steer.objectives.batch import Objective
from steer.objectives.direct import Direct, Draft
from steer.objectives.grpo import GRPO
from steer.objectives.nft import NFT
from steer.objectives.transport import Transport
from steer.objectives.value import Value

__all__ = ["OBJECTIVES", "RENAMED", "TABLE", "build", "described", "name_of", "options_of"]

TABLE: dict[str, type[Objective]] = {
    "direct": Direct,
    "transport": Transport,
    "value": Value,
    "amortise": Amortise,
    "nft": NFT,
    "grpo": GRPO,
    "adjoint": Adjoint,
    "draft": Draft,
}
"""Name -> its class; `steer.catalogue.OBJECTIVES` has one line on each."""

RENAMED = {
    "direct": {"data": "data_anchor", "noise": "noise_anchor"},
    "value": {"clip": "max_log_w"},
    "nft": {"clip": "max_advantage"},
}
"""Objective -> earlier names of its options -> current names."""


def build(objective: str | Objective, options: Mapping[str, Any] | None = None) -> Objective:
    """Return an objective by its name and options; an objective is returned unchanged.

    Raises:
        ValueError: an unknown name or option, with the nearest ones.
    """
    if isinstance(objective, Objective):
        if options:
            raise ValueError("options are for an objective by name: give them to the objective")
        return objective
    if objective not in TABLE:
        raise unknown("objective", objective, TABLE)
    kind = TABLE[objective]
    known = inspect.signature(kind).parameters
    for name in options or {}:
        if name not in known:
            today = RENAMED.get(objective, {}).get(name)
            near = hint(name, known) if today is None else f"it is called {today} now; "
            raise ValueError(
                f"objective {objective!r} takes no option {name!r}: {near}it takes "
                f"{', '.join(known)}"
            )
    return kind(**(options or {}))


def name_of(objective: Objective) -> str:
    """Return an objective's name, or the name of its class if it is not in the table."""
    for name, kind in TABLE.items():
        if type(objective) is kind:
            return name
    return type(objective).__name__


def options_of(objective: Objective) -> dict[str, Any]:
    """Return an objective's plain settings: parameter name -> value."""
    names = inspect.signature(type(objective)).parameters
    return {name: getattr(objective, name) for name in names if hasattr(objective, name)}


def described(objective: str) -> dict[str, tuple[Any, str]]:
    """Return an objective's options by name: the default, and the description from its class.

    >>> described("nft")["group"]
    (4, 'rows of each prompt in a batch.')

    Raises:
        ValueError: no such objective, with the nearest names.
    """
    if objective not in TABLE:
        raise unknown("objective", objective, TABLE)
    kind = TABLE[objective]
    _, _, rest = (inspect.getdoc(kind) or "").partition("\nArgs:\n")
    block = re.split(r"\n\S", rest)[0]
    said = {
        name: " ".join(text.split())
        for name, text in re.findall(r"^    (\w+): (.*?)(?=^    \w+: |\Z)", block, re.M | re.S)
    }
    known = inspect.signature(kind).parameters
    return {name: (p.default, said.get(name, "")) for name, p in known.items()}
