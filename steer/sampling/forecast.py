"""Compute the cost of a method in advance, by a dry run on a stub of the flow."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from steer.flow import FlowMap
from steer.path import Linear, Time
from steer.reward import wrap
from steer.sampling.counts import Counted, CountedReward, Counts
from steer.sampling.methods import AnyMethod, check_options, method_of

__all__ = ["affordable", "counts", "plan"]


class _Stub(FlowMap):
    """A flow of one constant number, with the real flow's cost per call but no computation."""

    def __init__(self, flow: FlowMap | None) -> None:
        super().__init__()
        self.path, self.event_shape = Linear() if flow is None else flow.path, (1,)
        self.like, self.churn = flow, 0.0 if flow is None else flow.churn
        has = flow is not None and flow.posterior_map is not None
        self.posterior_map = _StubPosterior() if has else None

    def velocity(self, x: Tensor, t: Time) -> Tensor:
        return 0 * x

    def jump(self, x: Tensor, s: Time, t: Time) -> Tensor:
        return 1 * x

    def denoise(self, x: Tensor, t: Time) -> Tensor:
        return super().denoise(x, t) if self.derives("denoise") else 1 * x

    def score(self, x: Tensor, t: Time) -> Tensor:
        return super().score(x, t) if self.derives("score") else -x

    def log_prob(self, x: Tensor, t: Time = 1.0) -> Tensor | None:
        return None if self.derives("log_prob") else 0 * x[:, 0]

    def calls(self, name: str, *times: Time) -> int:
        return 1 if self.like is None else self.like.calls(name, *times)

    def reuses(self, s: Time, t: Time) -> bool:
        return self.like is not None and self.like.reuses(s, t)

    def derives(self, name: str) -> bool:
        return True if self.like is None else self.like.derives(name)


class _StubPosterior:
    """Samples with the cost of a posterior map's samples."""

    def sample(self, x: Tensor, t: Time, n: int, **given: Any) -> Tensor:
        return x.expand(n, *x.shape)


def _times(steps: int, start: float, flow: FlowMap | None) -> list[float]:
    return (_Stub(None) if flow is None else flow).times(steps, start)


def _dry_run(
    method: AnyMethod,
    times: Sequence[float],
    differentiable: bool,
    options: dict[str, Any],
    flow: FlowMap | None,
    stop_after: int | None = None,
) -> Counts:
    """Run a method with one particle on a stub, stop it after some steps, and count its calls."""
    found = Counts()
    reward = CountedReward(wrap(lambda x: x.flatten(1).sum(1), differentiable), found)
    stub = Counted(_Stub(None if flow is None else flow.along(times)), found)
    sampler = method_of(method).build(stub, reward, None, 1.0, times, **options)
    for k, population in enumerate(sampler.steps(torch.zeros(1, 1))):
        if k + 1 == stop_after:
            population.wish.stop = True
    return found


def plan(
    method: AnyMethod,
    steps: int,
    differentiable: bool = True,
    start: float = 0.0,
    *,
    flow: FlowMap | None = None,
    times: Sequence[float] | None = None,
    **options: Any,
) -> dict[str, int]:
    """Return the maximum cost of a method per particle: network calls and reward calls.

    Network calls are NFE, theory (51).

    >>> plan("fmtt", 16)
    {'nfe': 47, 'reward_calls': 17}

    Args:
        method: its name, or your own method, see `method_of`.
        steps: of the run.
        differentiable: whether the reward has gradients.
        start: time at which the run begins.
        flow: the flow whose calls are counted. Default: one that evaluates its network once per
            call, and has no closed forms.
        times: of the run, instead of the flow's own.
        **options: the method's own.
    """
    found = counts(method, steps, differentiable, start, flow=flow, times=times, **options)
    return {"nfe": int(found.nfe), "reward_calls": int(found.reward)}


def counts(
    method: AnyMethod,
    steps: int,
    differentiable: bool = True,
    start: float = 0.0,
    *,
    flow: FlowMap | None = None,
    times: Sequence[float] | None = None,
    **options: Any,
) -> Counts:
    """Return the maximum cost per particle, gradients separately; arguments as for `plan`.

    >>> found = counts("fmrg-j", 8)
    >>> found.forward, found.backward, found.reward_gradient
    (16, 8, 8)
    """
    check_options(method, options)
    return _dry_run(method, times or _times(steps, start, flow), differentiable, options, flow)


def affordable(
    method: AnyMethod,
    steps: int,
    budget: float,
    differentiable: bool = True,
    start: float = 0.0,
    *,
    flow: FlowMap | None = None,
    times: Sequence[float] | None = None,
    **options: Any,
) -> int | None:
    """Return the number of steps after which a run must stop to cost at most `budget`; None: all.

    A run that ends after k steps jumps to t = 1.

    >>> affordable("none", 16, 5), affordable("none", 4, 5)
    (4, None)

    Args:
        method: its name, or your own method, see `method_of`.
        steps: of the whole run.
        budget: NFE a particle, theory (51).
        differentiable: whether the reward has gradients.
        start: time at which the run begins.
        flow: see `plan`.
        times: of the whole run, instead of the flow's own.
        **options: the method's own.

    Raises:
        ValueError: the budget is too small for one step and the end; the message has the minimum.
    """
    check_options(method, options)
    times = _times(steps, start, flow) if times is None else times
    steps = len(times) - 1

    def spent(k: int | None) -> int:
        return int(_dry_run(method, times, differentiable, options, flow, k).nfe)

    whole = spent(None)
    if whole <= budget:
        return None
    least = min(spent(1), whole) if steps > 1 else whole
    if steps == 1 or spent(1) > budget:
        raise ValueError(
            f"a budget of {budget:g} NFE a particle is too small: method "
            f"{method_of(method).name!r} needs at "
            f"least {least} for its first step and the end"
        )
    low, high = 1, steps  # within budget after low steps, not after high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if spent(middle) <= budget else (low, middle)
    return low
