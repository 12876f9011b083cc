"""The sampling methods by name: what each is built of, and what it costs."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

from torch import Tensor

from steer.flow import FlowMap
from steer.guidance import Guidance
from steer.kernel import Langevin, Sde
from steer.names import unknown
from steer.potential import Denoised, Lookahead, Naive, Potential
from steer.reward import Reward
from steer.weights import Continuous, Ratio

__all__ = ["METHODS", "TABLE", "Method", "method_options", "plan"]


def _published(
    view: Callable[..., Potential],
    flow: FlowMap,
    reward: Reward,
    prompts: Sequence[str] | None,
    temperature: Tensor | float,
    times: Sequence[float],
    *,
    scale: float = 1.0,
    threshold: float | Sequence[float] = 0.5,
) -> Guidance:
    """Build FMTT's scheme (2511.22688): Sde, Continuous weights; ratio weights off scale 1."""
    published = scale == 1
    return Guidance(
        view(flow, reward, prompts, temperature),
        Sde(flow, clip=None if published else 1.0),
        Continuous() if published else Ratio(),
        times=times,
        scale=scale,
        threshold=threshold,
    )


def _split(
    flow: FlowMap,
    reward: Reward,
    prompts: Sequence[str] | None,
    temperature: Tensor | float,
    times: Sequence[float],
    *,
    moves: int = 1,
    threshold: float | Sequence[float] = 0.5,
) -> Guidance:
    return Guidance(
        Lookahead(flow, reward, prompts, temperature),
        Langevin(flow, moves=moves),
        Ratio(),
        times=times,
        threshold=threshold,
    )


@dataclass(frozen=True)
class Method:
    """A line for people, how to build it, and what it costs a particle."""

    line: str
    build: Callable[..., Guidance] | None  # None: `steps` composed jumps, no guidance
    cost: Callable[..., tuple[int, int]]  # (steps, gradients?, options) -> NFE, reward calls
    gradient: bool = False


def _jumps_cost(steps: int, gradients: bool, options: Mapping[str, Any]) -> tuple[int, int]:
    """One jump a step; the reward at the end."""
    return steps, 1


def _published_cost(steps: int, gradients: bool, options: Mapping[str, Any]) -> tuple[int, int]:
    """Velocity and view at the start of each step, the view's gradient where the ramp is not 0."""
    shifted = options["scale"] != 0  # then r is looked at where the first step starts, too
    return steps + (steps - 1) * (1 + shifted) + shifted, steps + shifted


def _naive_cost(steps: int, gradients: bool, options: Mapping[str, Any]) -> tuple[int, int]:
    """The reward needs no network."""
    return steps, steps + (options["scale"] != 0)


def _split_cost(steps: int, gradients: bool, options: Mapping[str, Any]) -> tuple[int, int]:
    """A jump and a look a step; a score, and for each move a look and two scores."""
    look, moves = 1 + gradients, options["moves"]
    looks = (steps - 1) * (1 + moves)
    scores = (steps - 1) * (1 + 2 * moves) if moves else 0
    if not moves:
        look = 1
    return steps + looks * look + scores, looks + 1


TABLE: dict[str, Method] = {
    "none": Method("unguided: `steps` composed jumps", None, _jumps_cost),
    "best-of-n": Method(
        "unguided candidates by `steps` composed jumps, the best one wins", None, _jumps_cost
    ),
    "fmtt": Method(
        "flow-map trajectory tilting as published: SDE drift by the lookahead's gradient, "
        "resampling on ESS (2511.22688)",
        partial(_published, Lookahead),
        _published_cost,
        gradient=True,
    ),
    "denoiser": Method(
        "the same, with the reward seen through the denoiser",
        partial(_published, Denoised),
        _published_cost,
        gradient=True,
    ),
    "naive": Method(
        "the same, with the reward of the noisy state itself",
        partial(_published, Naive),
        _naive_cost,
        gradient=True,
    ),
    "split": Method(
        "exact: deterministic jump, ratio weight, resample, Metropolis-adjusted Langevin moves",
        _split,
        _split_cost,
    ),
}
METHODS: Mapping[str, str] = MappingProxyType({name: m.line for name, m in TABLE.items()})
"""Name -> one line."""


def method_options(method: str) -> dict[str, Any]:
    """Return the options that a method takes, with their defaults.

    >>> method_options("split")
    {'moves': 1, 'threshold': 0.5}

    Raises:
        ValueError: no such method; the message has the nearest names.
    """
    if method not in TABLE:
        raise unknown("method", method, METHODS)
    build = TABLE[method].build
    parameters = inspect.signature(build).parameters.values() if build else ()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def plan(method: str, steps: int, differentiable: bool = True, **options: Any) -> dict[str, int]:
    """Return what a method will cost a particle: NFE and reward calls.

    >>> plan("fmtt", 16)
    {'nfe': 47, 'reward_calls': 17}
    """
    known = method_options(method)
    nfe, rewards = TABLE[method].cost(steps, differentiable, known | options)
    return {"nfe": nfe, "reward_calls": rewards}
