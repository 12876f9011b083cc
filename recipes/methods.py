"""What the programs need to know about the sampling methods."""

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import steer
from steer.flow import FlowMap
from steer.sampling.calibrate import learn
from steer.sampling.forecast import plan
from steer.sampling.methods import Method, method_of
from steer.sampling.request import PROBES
from steer.sampling.result import Result, joined_trace

__all__ = [
    "PROBES",
    "TEMPERED",
    "Result",
    "check",
    "joined_trace",
    "learn",
    "method",
    "method_options",
    "network_calls",
    "plan",
    "probe_calls",
    "steers",
    "tempered",
]

TEMPERED = ("temperature", "strength")
"""Options of the methods that have a temperature."""


def method(name: str) -> Method:
    """Return a method by its name, or your own by `file.py:Name`.

    Raises:
        ValueError: an unknown name (the message has the nearest ones), or a file in which the name
            does not exist or is not a method.
        FileNotFoundError: no such file.
    """
    file, _, own = name.rpartition(":")
    if not file.endswith(".py"):
        return method_of(name)
    path = Path(file)
    return _own(name, path, own, path.stat().st_mtime_ns if path.is_file() else 0)


@lru_cache
def _own(name: str, file: Path, own: str, changed: int) -> Method:
    from steer.user_code import from_file

    return replace(method_of(from_file(file, own)), name=name)


def method_options(name: str) -> dict[str, Any]:
    """Return the options of a method, with their defaults."""
    return method(name).options


def tempered(name: str) -> bool:
    """Return whether a method samples a tilt at a temperature, with weights."""
    return method(name).tempered


def steers(name: str) -> bool:
    """Return whether a method evaluates the reward before the end."""
    return method(name).steers


def check(flow: steer.FlowMap, reward: steer.Reward, prompts: Any, **arguments: Any) -> None:
    """Raise the errors that `steer.sample` would raise for the same arguments, before any work."""
    steer.stream(flow, reward, prompts, **arguments)  # makes no step until it is iterated


def network_calls(
    name: str,
    steps: int,
    differentiable: bool,
    options: Mapping[str, Any],
    flow: FlowMap | None = None,
) -> int:
    """Return the network calls of a particle, without those that set a temperature.

    Args:
        name: name of the method.
        steps: steps of the method.
        differentiable: whether the reward has gradients.
        options: the method's own.
        flow: the flow whose calls are counted. Default: one with one network evaluation per call.
    """
    own = {k: v for k, v in options.items() if k not in TEMPERED}
    return plan(method(name), steps, differentiable, flow=flow, **own)["nfe"]


def probe_calls(flow: FlowMap | None = None) -> int:
    """Return the network calls that set the temperature of a prompt."""
    return PROBES * (1 if flow is None else flow.calls("jump", 0.0, 1.0))
