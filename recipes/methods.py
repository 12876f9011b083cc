"""What the programs need to know of the sampling methods, in one place."""

from collections.abc import Mapping
from typing import Any

import steer
from steer.sampling.calibrate import learn
from steer.sampling.forecast import plan
from steer.sampling.methods import TABLE, method_options
from steer.sampling.request import PROBES
from steer.sampling.result import Result, joined_trace

__all__ = [
    "PROBES",
    "TEMPERED",
    "Result",
    "check",
    "joined_trace",
    "learn",
    "method_options",
    "network_calls",
    "plan",
    "steers",
    "tempered",
]

TEMPERED = ("temperature", "strength")
"""Options of the methods that have a temperature."""


def tempered(method: str) -> bool:
    """Return whether a method samples a tilt at a temperature, with weights."""
    return TABLE[method].tempered


def steers(method: str) -> bool:
    """Return whether a method looks at the reward before the end."""
    return TABLE[method].steers


def check(flow: steer.FlowMap, reward: steer.Reward, prompts: Any, **arguments: Any) -> None:
    """Raise what `steer.sample` would, for the same arguments, before any work."""
    steer.stream(flow, reward, prompts, **arguments)  # makes no step until it is asked for one


def network_calls(
    method: str, steps: int, differentiable: bool, options: Mapping[str, Any]
) -> int:
    """Return the network calls of a particle, those that set a temperature left out."""
    own = {k: v for k, v in options.items() if k not in TEMPERED}
    return plan(method, steps, differentiable, **own)["nfe"]
