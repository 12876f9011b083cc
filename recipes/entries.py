"""Entries of a comparison at equal network calls, written as `method:key=value,key=value`.

Your own method is `file.py:Name`, or `file.py:Name:key=value,key=value`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import yaml
from jsonargparse import get_loader
from torch import Tensor

import steer
from recipes.methods import (
    TEMPERED,
    method_options,
    network_calls,
    probe_calls,
    steers,
    tempered,
)
from steer.flow import FlowMap
from steer.guidance.resampler import systematic
from steer.names import unknown

__all__ = ["Entry", "entry", "equal_calls", "finals", "paid"]

COUNTED = ("steps", "particles")
KEPT = ("best", "all")


@dataclass(frozen=True)
class Entry:
    """One row of the comparison.

    Attributes:
        method: its name.
        steps: steps of the method.
        particles: particles for each prompt; None: as many as the network calls of the other rows
            allow.
        options: the method's own, and temperature or strength.
        keep: "best": the picture is the particle with the highest reward; "all": every particle is
            a picture, after resampling by the weights, so that the pictures follow the method's
            law.
    """

    method: str
    steps: int
    particles: int | None
    options: Mapping[str, Any] = field(default_factory=dict)
    keep: str = "best"

    @property
    def mean(self) -> bool:
        """Whether every particle is a final picture, instead of only the best one."""
        return self.method == "none" or self.keep == "all"

    @property
    def label(self) -> str:
        """Its name in the tables."""
        rest = "".join(f", {name} {value}" for name, value in self.options.items())
        steps = f"{self.steps} step{'s' * (self.steps > 1)}"
        if self.method == "none":
            return f"none, {steps}{rest}"
        if self.method == "best-of-n":
            return f"best of {self.particles or 'n'}, {steps}{rest}"
        particles = f"{self.particles} particle{'s' * (self.particles != 1)}"
        kept = ", all kept" if self.keep == "all" else ""
        return f"{self.name}, {steps}, {particles}{rest}{kept}"

    @property
    def name(self) -> str:
        """The method's name; for `file.py:Name` it is Name."""
        return self.method.rpartition(":")[2]

    def each(self, differentiable: bool, flow: FlowMap | None = None) -> int:
        """Return the network calls of one particle, without those that set a temperature."""
        return network_calls(self.method, self.steps, differentiable, self.options, flow)

    def calls(self, differentiable: bool, flow: FlowMap | None = None) -> int:
        """Return the network calls of one prompt, including those that set its temperature."""
        probed = tempered(self.method) and "temperature" not in self.options
        return (self.particles or 0) * self.each(differentiable, flow) + (
            probe_calls(flow) if probed else 0
        )


def entry(text: str) -> Entry:
    """Read "method:key=value,key=value"; the values are YAML.

    >>> entry("fmtt:steps=8,strength=3").label
    'fmtt, 8 steps, 4 particles, strength 3'

    Raises:
        ValueError: an unknown method or option (the message has the nearest names), or a value of
            the wrong type.
    """
    own = re.match(r"(.*\.py:\w+)(?::|$)(.*)", text, re.DOTALL)
    name, _, written = (own[1], "", own[2]) if own else text.partition(":")
    defaults = method_options(name)
    known = [*COUNTED, "keep", *defaults, *(TEMPERED if tempered(name) else ())]
    pairs = re.sub(r"(?:(?<=,)|^)\s*([\w-]+)\s*=", r" \1: ", written)
    try:
        values = get_loader("yaml")(f"{{{pairs}}}")
    except (yaml.YAMLError, RecursionError):
        values = None
    if not isinstance(values, dict):  # the loader returns text that it cannot parse unchanged
        raise ValueError(f"cannot read {text[:60]!r}: write method:key=value,key=value")
    for key, value in values.items():
        if key not in known:
            raise unknown(f"option of method {name!r},", str(key), known)
        if key == "keep":
            continue
        if value is None or (
            isinstance(value, str) and not isinstance(defaults.get(key, 0), str | None)
        ):
            raise ValueError(f"option {key!r} of {text!r} is not a number: write {key}=...")
        if key in COUNTED and (isinstance(value, bool) or not isinstance(value, int)):
            raise ValueError(f"option {key!r} of {text!r} must be a whole number")
    keep = values.pop("keep", "best")
    if keep not in KEPT or (keep == "all" and name == "best-of-n"):
        raise ValueError(
            f"option 'keep' of {text!r}: write best, or all for each particle of a method other "
            "than best-of-n"
        )
    steps = values.pop("steps", 16 if steers(name) else 4)
    particles = values.pop("particles", None if name == "best-of-n" else 4)
    return Entry(name, steps, particles, values, keep)


def equal_calls(
    entries: Sequence[Entry], differentiable: bool, flow: FlowMap | None = None
) -> list[Entry]:
    """Replace a best-of-n without `particles` by one row per method, with as many network calls.

    Methods with the same cost share a row. The cost is the number of network calls for one
    picture: those of all particles, or of one particle if all are kept.

    Raises:
        ValueError: there is no method to match, or a row occurs twice.
    """
    open_ones = [e for e in entries if e.particles is None]
    rows: list[Entry] = []
    for one in entries:
        if one.particles is None:
            continue
        rows.append(one)
        if steers(one.method):
            total = one.calls(differentiable, flow) // (one.particles if one.mean else 1)
            beside = [
                replace(e, particles=max(1, total // e.each(differentiable, flow)))
                for e in open_ones
            ]
            rows += [e for e in beside if e not in rows and e not in entries]
    if open_ones and not any(steers(e.method) for e in rows):
        raise ValueError(
            "best-of-n without particles gets as many candidates as the network calls of another "
            "method allow: give it particles, or add a guided method"
        )
    labels = [row.label for row in rows]
    for label in labels:
        if labels.count(label) > 1:
            raise ValueError(f"{label!r} is given twice: leave one out")
    return rows


def finals(row: Entry, result: steer.Result, seed: int) -> tuple[Tensor, Tensor]:
    """Return the final pictures (p, k, ...) of a row, and their rewards (p, k).

    k is 1 for the particle with the highest reward, or the number of particles, resampled by their
    weights, if each is a final picture.

    Args:
        row: the entry that was sampled.
        result: its result; for a model without pictures its samples are returned unchanged.
        seed: seed of the resampling.
    """
    made, scores = result.x if result.images is None else result.images, result.rewards
    if row.mean:
        generator = torch.Generator().manual_seed(seed)
        kept = torch.stack([systematic(few, generator) for few in result.log_w]).to(made.device)
    else:
        kept = result.best[:, None]
    of = torch.arange(len(made), device=kept.device)[:, None]
    return made[of, kept], scores[of, kept]


def paid(row: Entry, result: steer.Result) -> float:
    """Return the counted network calls per final picture of a row.

    Args:
        row: the entry that was sampled.
        result: its samples.
    """
    n = result.rewards.shape[1]
    each = 1 if row.mean else n
    return each * result.nfe + result.costs["temperature_nfe_per_prompt"] * each / n
