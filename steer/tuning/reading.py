"""`Reading` and `Paired`: statistics of the tuned pictures, compared with the base's."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from steer.tuning.statistics import Drift

__all__ = ["Paired", "Reading", "paired"]


class Paired(NamedTuple):
    """One statistic of the tuned pictures, with that of the base's pictures.

    Attributes:
        mean: over the tuned pictures.
        error: its standard error; None for a single one.
        base: mean over the base's pictures.
        spread: standard deviation over the base's pictures.
        change: mean of the differences of each picture from its pair.
        change_error: its standard error; None for a single one.
    """

    mean: float
    error: float | None
    base: float
    spread: float
    change: float
    change_error: float | None

    def moved(self, errors: float) -> bool:
        """Return whether the change exceeds this many of its standard errors."""
        return self.change_error is None or abs(self.change) > errors * self.change_error


def paired(new: Tensor, old: Tensor) -> Paired:
    """Compare values (n,) with those of the base, in float64."""
    new, old = new.double(), old.double()
    change = new - old
    root = math.sqrt(len(new))
    alone = len(new) < 2
    return Paired(
        float(new.mean()),
        None if alone else float(new.std()) / root,
        float(old.mean()),
        0.0 if alone else float(old.std()),
        float(change.mean()),
        None if alone else float(change.std()) / root,
    )


@dataclass(frozen=True)
class Reading:
    """The result of `Instruments.read`.

    Attributes:
        values: by name: `reward`, `judge`, `held_out/NAME`, `diversity` and the statistics of
            `image_statistics`, as far as available.
        kid: kernel distance to the base's pictures, paired, and its spread.
        drift: drift of the velocity, if it was given.
    """

    values: Mapping[str, Paired]
    kid: tuple[float, float]
    drift: Drift | None = None

    def as_dict(self) -> dict[str, float]:
        """Return every number by name, for a log or a JSON file.

        `NAME` is the mean over the tuned pictures, `NAME/error`, `NAME/base`, `NAME/change` and so
        on are the others, see `Paired`; unknown numbers are left out.
        """
        out: dict[str, float] = {}
        for name, value in self.values.items():
            out[name] = value.mean
            rest = value._asdict().items()
            out |= {f"{name}/{k}": v for k, v in rest if k != "mean" and v is not None}
        out |= {"kid": self.kid[0], "kid/spread": self.kid[1]}
        if self.drift is not None:
            out |= {f"drift/{k}": v for k, v in self.drift._asdict().items()}
        return out
