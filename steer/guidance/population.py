"""Guided sampling as sequential Monte Carlo: potential, kernel, weights, resampler.

Each step proposes, weights, resamples where the effective sample size has fallen, and moves. With
`Ratio` weights, theory (23), `E[exp(log_z)] = Z = E_p[exp(reward / temperature)]` for the kernel's
own law p, theory (37).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

__all__ = ["Population", "Stop", "check_times", "lead_shape", "not_finite"]


@dataclass(frozen=True)
class Population:
    """Weighted particles at one time. A leading prompt axis (p,) where the caller gave one.

    Attributes:
        x: the particles, (n, *event) or (p, n, *event).
        time: where they are.
        log_w: log-weights since the last resampling, unnormalised, (n,) or (p, n).
        log_z: the whole estimate of log Z up to here, theory (37), () or (p,).
        reward: the reward as the potential sees it from here, in its own units, (n,) or (p, n);
            NaN where nothing is seen yet.
        ess: the effective sample size, () or (p,).
    """

    x: Tensor
    time: float
    log_w: Tensor
    log_z: Tensor
    reward: Tensor
    ess: Tensor


Stop = Callable[[Population], bool]

"""Says, after a step, whether the run shall end."""


def check_times(times: Sequence[float]) -> None:
    """Raise a ValueError unless times increase within [0, 1], at least two of them."""
    ts = list(times)
    if len(ts) < 2 or ts[0] < 0 or ts[-1] > 1 or any(a >= b for a, b in pairwise(ts)):
        raise ValueError(f"times must increase within [0, 1], at least two of them; got {ts}")


def lead_shape(x0: Tensor, event_shape: Sequence[int]) -> tuple[int, ...]:
    """Return (n,) or (p, n) of a start.

    Raises:
        ValueError: it has another shape.
    """
    event = tuple(event_shape)
    lead = tuple(x0.shape[: x0.ndim - len(event)])
    if tuple(x0.shape[len(lead) :]) != event or len(lead) not in {1, 2} or 0 in lead:
        raise ValueError(
            f"a start of shape {tuple(x0.shape)}: this flow wants (n, {event}) or, with "
            f"prompts, (p, n, {event}), events of shape {event}"
        )
    return lead


def not_finite(
    what: str,
    values: Tensor,
    particles: int,
    position: int,
    prompts: Sequence[str] | None,
    where: str,
) -> None:
    """Raise for the first row that is not finite.

    Args:
        what: what the numbers are.
        values: one number a row, prompt-major.
        particles: rows of a prompt.
        position: the place of the first prompt in the caller's whole list.
        prompts: what the reward is asked.
        where: step and time.

    Raises:
        FloatingPointError: names prompt, particle and step.
    """
    bad = (~torch.isfinite(values)).nonzero()
    if not len(bad):
        return
    row = int(bad[0])
    i = row // particles
    name = f" ({prompts[i % len(prompts)]!r})" if prompts else ""
    raise FloatingPointError(
        f"the {what} is {float(values[row])} for prompt {position + i}{name}, particle "
        f"{row % particles}, {where}: a reward must be finite for every "
        "picture; guard its logarithms and divisions, or raise the temperature if it "
        "only overflows"
    )
