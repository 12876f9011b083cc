"""A second time for any flow, which makes a velocity model a map: `steer.backends.second_time`.

A pipeline's flow supports it directly; other flows are wrapped.
"""

import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor, nn

from steer.adapters.store import BESIDE, WEIGHTS, read_metadata
from steer.backends.second_time import SecondTime
from steer.backends.target_time import FORM, TargetTime
from steer.flow import FlowMap, Wrapped
from steer.onto import row_times
from steer.path import Time, as_time, like

__all__ = ["SecondTimed", "fresh_second_time", "read_second_time", "with_second_time"]


Term = SecondTime | TargetTime


class SecondTimed(Wrapped):
    """A flow with the velocity of the inner flow, whose jumps depend on their end through a term.

    `X(s,t,x) = x + (t-s) v(x,s,t)`, v the inner velocity at s with the term of (s, t) in its
    embedding of the time: exactly the velocity at s = t.

    Args:
        flow: the velocity; its denoiser has the module that the term is added to.
        second_time: the term.
    """

    def __init__(self, flow: FlowMap, second_time: Term) -> None:
        super().__init__(flow)
        second_time.check(flow.denoiser)
        self.second_time = second_time

    def _hold(self, flow: FlowMap) -> None:
        super()._hold(flow)
        self.kind = "two-time"

    def _told(self, x: Tensor, s: Time, t: Time) -> AbstractContextManager[None]:
        now, target = 1 - row_times(s, x), 1 - row_times(t, x)
        return self.second_time.told(self.flow.denoiser, now, target)

    def reuses(self, s: Time, t: Time) -> bool:
        """Return False: a jump knows its end."""
        return False

    def mean_velocity(self, x: Tensor, s: Time, t: Time) -> Tensor:
        """Return v(x, s, t), (n, *event)."""
        with self._told(x, s, t):
            return self.flow.velocity(x, s)

    def jump(self, x: Tensor, s: Time, t: Time) -> Tensor:
        """Return `X(s,t,x) = x + (t-s) v(x,s,t)`: exactly x where s = t."""
        return x + like(as_time(t) - as_time(s), x) * self.mean_velocity(x, s, t)


def with_second_time(flow: FlowMap, term: Term) -> FlowMap:
    """Return a flow whose jumps depend on their end through a term; `flow` is not changed.

    Raises:
        ValueError: its denoiser has no module of the term's name.
    """
    place: Any = getattr(flow, "with_second_time", None)
    return SecondTimed(flow, term) if place is None else place(term)


def fresh_second_time(flow: FlowMap, module: str | None = None, **options: Any) -> Term:
    """Return an untrained term for a flow: with it every jump is one Euler step.

    Args:
        flow: the velocity.
        module: the module of its denoiser that embeds the time, (n, width), by its dotted name.
            Default: known for the supported classes.
        **options: of `SecondTime`.

    Raises:
        ValueError: the module is not known, or does not exist.
    """
    own: Any = getattr(flow, "fresh_term", None)
    if own is not None and module is None:
        return own()
    known = getattr(flow, "time_embedding", None)
    name = module or known or ("start" if hasattr(flow.denoiser, "start") else None)
    if name is None:
        raise ValueError(
            f"which module of {type(flow.denoiser).__name__} embeds the time is not known: give "
            "its dotted name (--module), one whose output is (n, width)"
        )
    try:
        inside = flow.denoiser.get_submodule(name)
    except AttributeError:
        raise ValueError(
            f"{type(flow.denoiser).__name__} has no module {name!r}: give the one that embeds the "
            "time by its dotted name"
        ) from None
    linear = [m for m in inside.modules() if isinstance(m, nn.Linear)]
    if not linear:
        raise ValueError(f"{name!r} has no linear layer: give the module that embeds the time")
    return SecondTime(name, linear[-1].out_features, **options).to(linear[-1].weight.device)


def read_second_time(folder: str | os.PathLike[str]) -> Term | None:
    """Return the term in a folder of adapters; None if it has none.

    Raises:
        ValueError: the file's tensors do not match its metadata.
    """
    config = read_metadata(folder).get("second_time")
    if config is None:
        return None
    file = Path(folder) / WEIGHTS
    try:
        whole = safetensors.torch.load_file(file)
        inside = {k.removeprefix(BESIDE): v for k, v in whole.items() if k.startswith(BESIDE)}
        kind = TargetTime if config.get("form") == FORM else SecondTime
        return kind.of(config, inside)
    except (KeyError, TypeError, RuntimeError, ValueError) as error:
        raise ValueError(f"{file} has no second time that can be read: {error}") from None
