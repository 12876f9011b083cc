"""The rows of `steer eval --lora`: base, tuned and guided, at equal network calls."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from recipes.entries import Entry
from recipes.methods import network_calls, tempered
from steer.flow import FlowMap

__all__ = ["Row", "calls_of", "rows_of"]


@dataclass(frozen=True)
class Row:
    """A row: a flow and a method.

    Attributes:
        method: a method of `steer.METHODS`.
        steps: steps of the method.
        adapter: name of the adapters; "" is the base.
        scale: scale of the adapters.
        count: candidates of a picture, of which the one with the highest reward is kept. A method
            with weights keeps one of all its particles.
        section: the number of steps whose network calls it must match; None: it has its own cost.
        options: the method's own.
    """

    method: str
    steps: int
    adapter: str = ""
    scale: float = 1.0
    count: int = 1
    section: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def plain(self) -> bool:
        """Whether it is not guided."""
        return self.method == "none"

    @property
    def label(self) -> str:
        """Its name in tables."""
        steps = f"{self.steps} step{'s' * (self.steps > 1)}"
        at = "" if self.scale == 1 else f" at {self.scale:g}"
        if self.plain:
            return f"{self.adapter + at or 'base'}, {steps}"
        on = f" on {self.adapter}{at}" if self.adapter else ""
        rest = "".join(f", {name} {value}" for name, value in self.options.items())
        if self.method == "best-of-n":
            return f"best of {self.count}, {steps}{rest}{on}"
        return f"{self.method.rpartition(':')[2]}, {steps}{rest}{on}"


def rows_of(
    adapters: Sequence[str],
    scales: Sequence[float],
    steps: Sequence[int],
    entries: Sequence[Entry],
    differentiable: bool = True,
    guided_tuned: bool = False,
    flow: FlowMap | None = None,
) -> list[Row]:
    """Return the rows to sample, and the base with the number of steps of each.

    A best-of-n without `particles` has as many candidates as each number of steps has network
    calls. A method that steers without weights also gets a row for each number of steps, with as
    many of its own steps as those calls allow, if any.

    >>> from recipes.entries import entry
    >>> entries = [entry("reno:steps=3"), entry("best-of-n:steps=1")]
    >>> [row.label for row in rows_of(["a"], [0.5, 1], [1, 2], entries)]  # doctest: +ELLIPSIS
    ['base, 1 step', 'a at 0.5, 1 step', 'a, 1 step', 'base, 2 steps', ..., 'base, 3 steps']

    Args:
        adapters: names of the adapters.
        scales: of the adapters.
        steps: numbers of jumps for base and tuned models.
        entries: entries of the guided methods.
        differentiable: whether the reward has a gradient.
        guided_tuned: also guide the tuned flows, at the largest scale, by the first method.
        flow: the base, whose calls are counted.

    Raises:
        ValueError: an entry with its own number of particles.
    """
    rows: list[Row] = []
    plain = {k: network_calls("none", k, differentiable, {}, flow) for k in steps}
    for k in steps:
        rows += [Row("none", k, section=k)]
        rows += [Row("none", k, a, scale, section=k) for a in adapters for scale in scales]
    for one in entries:
        made = Row(one.method, one.steps, options=one.options)
        if one.method == "best-of-n":
            if one.particles is not None:
                rows.append(replace(made, count=one.particles))
                continue
            counts = {k: plain[k] // one.each(differentiable, flow) for k in steps}
            rows += [replace(made, count=n, section=k) for k, n in counts.items() if n > 1]
            continue
        if made.plain:
            rows.append(made)
            continue
        if tempered(one.method):
            rows.append(replace(made, count=one.particles or 1))
            continue
        if one.particles != 4:
            raise ValueError(
                f"each particle of {one.method!r} is a separate picture: set their number with "
                "particles, not in the list of guidance"
            )
        rows.append(made)
        for k in steps:
            fewer = [replace(made, steps=s, section=k) for s in range(1, k + 1)]
            rows += [r for r in fewer if calls_of(r, differentiable, flow) <= plain[k]][-1:]
    first = next((r for r in rows if not r.plain and r.section is None), None)
    if guided_tuned and first is not None:
        rows += [replace(first, adapter=a, scale=max(scales)) for a in adapters]
    rows += [Row("none", k) for k in sorted({row.steps for row in rows})]
    distinct: dict[str, Row] = {}
    for row in rows:
        distinct.setdefault(row.label, row)
    return list(distinct.values())


def calls_of(row: Row, differentiable: bool, flow: FlowMap | None = None) -> int:
    """Return the network calls of a picture, without those that set a temperature."""
    return row.count * network_calls(row.method, row.steps, differentiable, row.options, flow)
