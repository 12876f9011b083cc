"""`Plan`: the figures of a plan, what fits on which card, and a one-line summary."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from steer.planning.steps import Need

__all__ = ["CARDS", "Fit", "Lever", "Plan", "gib", "usable"]

CARDS = (12, 16, 24, 48, 80, 141)
"""Memory of the cards in a plan, in GiB."""

GIB = 2**30

SHARE = 0.95
"""Fraction of free memory that is usable for tensors, because of fragmentation."""

MOST_ROWS = 64
"""Maximum number of rows per call, unless a number is given."""


def gib(count: float) -> str:
    """Return bytes as a readable text.

    >>> gib(3 * 2**30), gib(5 * 2**20), gib(200_000)
    ('3.0 GiB', '5 MiB', '0.2 MiB')
    """
    if abs(count) >= 0.5 * GIB:
        return f"{count / GIB:.1f} GiB"
    size = count / 2**20
    return f"{size:.0f} MiB" if abs(size) >= 1 else f"{size:.1f} MiB"


def usable(card: float) -> float:
    """Return the bytes of a card that are usable for tensors, by a rule of thumb.

    1 GiB is subtracted for the driver's context and memory inside kernels, and 5 % of the rest for
    fragmentation.

    Args:
        card: its memory in GiB.
    """
    return max(0.0, SHARE * (card - 1)) * GIB


@dataclass(frozen=True)
class Lever:
    """An option that changes how much memory is needed.

    Attributes:
        name: name of the option.
        how: how to set it; empty if it is already the default.
        need: need of the guided step with only this option.
    """

    name: str
    how: str
    need: Need


@dataclass(frozen=True)
class Fit:
    """How a model fits a card.

    Attributes:
        rows: rows per call; 0: it does not fit.
        levers: the options that are needed, in the order in which they were tried.
    """

    rows: int
    levers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """What a run needs, computed on tensors without values: nothing was loaded or measured.

    Bytes count the tensors that are alive at the same time. Memory inside kernels and of the
    allocator comes on top, see `usable`.

    Attributes:
        model: its name.
        source: source of its sizes.
        size: height and width of the pictures.
        dtype: dtype of the weights.
        cuda: whether it is for a CUDA device.
        rows: rows of one call.
        method: sampling method.
        objective: tuning objective.
        reward: its name.
        parameters: part -> number of parameters.
        weights: part -> bytes.
        saved: part -> bytes that one row's call keeps for its backward pass.
        guided: a guided step.
        tuning: an optimizer step of reward tuning; None: not requested.
        training: an optimizer step that trains all weights; None: not requested.
        levers: effect of each memory option on the guided step.
        stack: memory options added one by one, in the order in which they are tried for cards.
        calls: nfe and reward_calls per particle.
        notes: notes on what is not counted.
    """

    model: str
    source: str
    size: tuple[int, int]
    dtype: str
    cuda: bool
    rows: int
    method: str
    objective: str
    reward: str
    parameters: Mapping[str, int]
    weights: Mapping[str, int]
    saved: Mapping[str, int]
    guided: Need
    tuning: Need | None = None
    training: Need | None = None
    levers: Sequence[Lever] = ()
    stack: Sequence[Lever] = ()
    calls: Mapping[str, int] = field(default_factory=dict)
    notes: Sequence[str] = ()

    @property
    def weight(self) -> int:
        """Bytes of all weights."""
        return sum(self.weights.values())

    def fits(self, card: float) -> Fit:
        """Return how many rows a call may have on a card, and with which memory options.

        These are the first options of `stack` with which one row fits; none if it fits as planned.

        Args:
            card: its memory in GiB.
        """
        tried: list[str] = []
        for lever in self.stack or [Lever("", "", self.guided)]:
            tried += [lever.name] if lever.name else []
            rows = min(MOST_ROWS, lever.need.rows(usable(card)))
            if rows:
                return Fit(rows, tuple(tried))
        return Fit(0, tuple(tried))

    def line(self, free: float | None = None, total: float | None = None) -> str:
        """Return the plan in one line, with the device's memory (in bytes) if it is known.

        It is about the tuning step if there is one, else about the guided step.
        """
        height, width = self.size
        need, what, option = self.guided, "a guided step", "--batch-size"
        if self.tuning is not None:
            need, what, option = self.tuning, "a tuning step", "--micro-batch"
        peak = need.at(self.rows)
        said = (
            f"memory: weights {gib(self.weight)} ({self.dtype}), {what} of {self.rows} "
            f"row{'s' * (self.rows != 1)} at {height} x {width} about {gib(peak)}"
        )
        if total is None:
            return said
        left = SHARE * (total if free is None else free)
        said += f"; the device has {gib(total)}"
        said += f", {gib(free)} of it free" if free is not None else ""
        if peak <= left:
            return said
        rows = need.rows(left)
        if rows:
            return f"{said}: too little, take {option} {rows}"
        names = [lever.name for lever in self.levers if lever.need.at(1) <= left]
        mend = f"; what would do: {', or '.join(names)}" if names else ""
        return f"{said}: too little for one row{mend}. See `steer plan`"

    def as_dict(self) -> dict[str, Any]:
        """Return all figures, in bytes, as JSON values."""
        steps = {"guided": self.guided, "tuning": self.tuning, "training": self.training}
        return {
            "model": self.model, "source": self.source, "height": self.size[0],
            "width": self.size[1], "dtype": self.dtype, "cuda": self.cuda, "rows": self.rows,
            "method": self.method, "objective": self.objective, "reward": self.reward,
            "parameters": dict(self.parameters), "weights": dict(self.weights),
            "saved_for_backward_per_row": dict(self.saved),
            "steps": {
                name: {"base": one.base, "per_row": one.row, "peak": one.at(self.rows)}
                for name, one in steps.items() if one is not None
            },
            "levers": [
                {"name": one.name, "how": one.how, "peak": one.need.at(self.rows),
                 "less": self.guided.at(self.rows) - one.need.at(self.rows)}
                for one in self.levers
            ],
            "cards": {
                str(card): {"rows": fit.rows, "levers": list(fit.levers)}
                for card in CARDS for fit in [self.fits(card)]
            },
            "calls_per_particle": dict(self.calls), "notes": list(self.notes),
        }  # fmt: skip
