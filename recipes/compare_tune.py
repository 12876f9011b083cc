"""`steer compare --tune`: one or two numbers of a method, chosen on prompts not reported."""

import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import yaml
from jsonargparse import get_loader
from torch import Tensor

from recipes.crew import Crew
from recipes.entries import Entry
from recipes.inputs import Asked
from recipes.methods import method_options, tempered
from recipes.partial import Partial, Unit

__all__ = ["grid_of", "kept_in", "tune", "tuning_prompts_beside"]

Measure = Callable[[Unit[Entry]], tuple[dict[str, Tensor], dict[str, Any]]]
"""Samples and scores a unit -> tensors, and their cost."""

MeasureAll = Callable[
    [Sequence[Unit[Entry]]], Iterable[tuple[Mapping[str, Tensor], Mapping[str, Any]]]
]
"""The same for several units, in order."""

MOST = 12
"""Number of prompts for tuning."""


def grid_of(text: str) -> dict[str, list[Any]]:
    """Read "scale=0.1,0.3,1; steps=8,16".

    >>> grid_of("scale=0.1,0.3")
    {'scale': [0.1, 0.3]}
    >>> grid_of("rate=1e-2,2e-2; window=[0, 1],[0.2, 1]")
    {'rate': [0.01, 0.02], 'window': [[0, 1], [0.2, 1]]}

    Raises:
        ValueError: it cannot be read, or has more than two names.
    """
    found = {}
    for part in filter(None, (p.strip() for p in text.split(";"))):
        name, equals, values = part.partition("=")
        if not equals or not re.fullmatch(r"[\w-]+", name.strip()) or not values.strip():
            raise ValueError(f"cannot read {part!r}: write tune as 'scale=0.1,0.3,1'")
        try:
            found[name.strip()] = get_loader("yaml")(f"[{values}]")
        except yaml.YAMLError:
            raise ValueError(f"cannot read the values {values!r} of {name.strip()}") from None
    if not 1 <= len(found) <= 2:
        raise ValueError(f"tune takes one or two numeric options of a method, got {len(found)}")
    return found


def tuning_prompts_beside(reported: Sequence[str | None], pool: Sequence[str]) -> Asked:
    """Return at most `MOST` prompts of a pool that are not reported.

    Raises:
        ValueError: there are none, so that prompts for tuning and for reporting would be the same.
    """
    left = [p for p in dict.fromkeys(pool) if p not in set(reported)][:MOST]
    if not left:
        raise ValueError(
            "all tuning prompts are also reported: give --tune-prompts a list of other prompts"
        )
    return Asked(left, None)


def kept_in(partial: Partial, run: Measure, crew: Crew | None = None) -> MeasureAll:
    """Return a function that measures units by `run`, and stores them with a run's finished ones.

    Tuning measures in the same order when an interrupted run is resumed, so each measurement is
    identified by its number. With several processes each measures a share, and reads all.

    Args:
        partial: the unfinished run.
        run: samples and scores a unit.
        crew: the processes of the run. Default: this one alone.
    """
    crew = crew or Crew()

    def measured(units: Sequence[Unit[Entry]]) -> list[tuple[dict[str, Tensor], dict[str, Any]]]:
        names = [f"tune_{k:03d}" for k in range(len(units))]
        for name, unit in crew.share(list(zip(names, units, strict=True))):
            if not partial.has(name):
                tensors, notes = run(unit)
                scores = {k: tensors[k] for k in ("reward", "judge") if k in tensors}
                partial.add(name, scores, {"entry": unit.row.label, **notes})
        crew.wait(lambda: all(partial.has(name) for name in names))
        return [partial.read(name) for name in names]

    return measured


def tune(
    entries: Sequence[Entry],
    grid: Mapping[str, Sequence[Any]],
    by: str,
    run: MeasureAll,
    prompts: int,
    say: Callable[[str], None],
) -> tuple[list[Entry], list[dict[str, Any]]]:
    """Return the entries with the best values of a grid, and the measurements.

    Entries whose method has none of these options are unchanged.

    Args:
        entries: the entries that are compared.
        grid: option -> values.
        by: "judge" or "reward": its mean over prompts, for the returned pictures.
        run: samples and scores units.
        prompts: number of prompts.
        say: prints a line.

    Raises:
        ValueError: no method has any of these options, or another `by`.
    """
    if by not in ("judge", "reward"):
        raise ValueError(f"by is judge or reward, got {by!r}")
    trials = [
        Unit(place, tried, 0, prompts, 1000)
        for place, one in enumerate(entries)
        for tried in _tried(one, grid)
    ]
    if not trials:
        raise ValueError(f"no method here takes {' or '.join(grid)}: see steer methods")
    chosen, height, rows = list(entries), [-math.inf] * len(entries), []
    for unit, (tensors, _) in zip(trials, run(trials), strict=True):
        if by not in tensors:
            raise ValueError("tuning by the judge needs a judge: give --judge, or --by reward")
        found = {k: float(tensors[k].mean()) for k in ("reward", "judge") if k in tensors}
        rows.append({"entry": unit.row.label, **found})
        say(f"tuning {unit.row.label}: {', '.join(f'{k} {v:.4f}' for k, v in found.items())}")
        if found[by] > height[unit.index]:
            chosen[unit.index], height[unit.index] = unit.row, found[by]
    return chosen, rows


def _tried(one: Entry, grid: Mapping[str, Sequence[Any]]) -> Iterator[Entry]:
    """Yield an entry with each combination of the grid's values that its method takes."""
    known = {"steps", *method_options(one.method)}
    known |= {"temperature", "strength"} if tempered(one.method) else set()
    names = [n for n in grid if n in known and one.particles is not None]
    for values in itertools.product(*(grid[n] for n in names)) if names else ():
        given = dict(zip(names, values, strict=True))
        steps = given.pop("steps", one.steps)
        yield replace(one, steps=steps, options={**one.options, **given})
