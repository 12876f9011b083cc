"""Builders of the basic methods: unguided jumps, FMTT, the split scheme, FMRG-J, ReNO."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from steer.flow import FlowMap
from steer.guidance.ascent import FlowMapControl, NoiseAscent, Sampler, whole_reward
from steer.guidance.best_seen import BestSeen
from steer.guidance.control import Window, controlled
from steer.guidance.kernel import Jump, Langevin, Sde
from steer.guidance.potential import Lookahead, Potential, Terminal
from steer.guidance.smc import Guidance
from steer.guidance.weights import Continuous, Ratio, Unweighted
from steer.ranges import not_negative
from steer.reward import Reward

__all__ = ["fmrg_j", "fmtt", "reno", "split", "unguided"]

WHOLE = (0.0, 1.0)


def unguided(
    flow: FlowMap,
    reward: Reward,
    prompts: Sequence[str] | None,
    temperature: Tensor | float,
    times: Sequence[float],
    *,
    churn: float | None = None,
) -> Guidance:
    """Build composed jumps, whose reward is evaluated at the end.

    With churn they go past each time and re-noise back; None: as the model's own sampler does.
    """
    kernel = Jump(flow, flow.churn if churn is None else churn)
    view = Terminal(flow, reward, prompts)
    return Guidance(view, kernel, Unweighted(), times=times, threshold=0.0)


def fmtt(
    view: Callable[..., Potential],
    flow: FlowMap,
    reward: Reward,
    prompts: Sequence[str] | None,
    temperature: Tensor | float,
    times: Sequence[float],
    *,
    scale: float = 1.0,
    threshold: float | Sequence[float] = 0.5,
    settle: bool = True,
    lookahead: int = 1,
    window: Sequence[float] = WHOLE,
    every: int = 1,
    clip: float | None = None,
    normalise: float | None = None,
    noise: float = 1.0,
) -> Guidance:
    """Build FMTT's scheme, theory (20, 29) (2511.22688): Sde, Continuous weights.

    With a scale other than 1, or with controls of the gradient, the weights are Ratio.
    `eps_t = noise (1 - t)`. The published weights have a bias of the order of the step, so log Z
    is not reliable with few steps (docs/results.md).
    """
    not_negative("noise", noise, ": eps_t = noise (1 - t)")
    plain = view(flow, reward, prompts, temperature, lookahead)
    potential = controlled(
        plain, times, window=Window.of(window, every), clip=clip, normalise=normalise
    )
    published = scale == 1 and potential is plain
    return Guidance(
        potential,
        Sde(flow, lambda t: noise * (1 - t), clip=None if published else 1.0, settle=settle),
        Continuous() if published else Ratio(),
        times=times,
        scale=scale,
        threshold=threshold,
    )


def split(
    flow: FlowMap,
    reward: Reward,
    prompts: Sequence[str] | None,
    temperature: Tensor | float,
    times: Sequence[float],
    *,
    moves: int = 1,
    threshold: float | Sequence[float] = 0.5,
    lookahead: int = 1,
    least: float | None = None,
) -> Guidance:
    """Build the split scheme, theory (30): jump, ratio weight, resample, Langevin moves.

    Fails in 10 steps for strong tilts in 16 and 64 dimensions, in 25 for a strong reward that is
    far narrower than a mode, and for modes at 1 : 1000 (docs/results.md).
    """
    ramp = None if least is None else torch.ones_like
    return Guidance(
        Lookahead(flow, reward, prompts, temperature, lookahead, ramp),
        Langevin(flow, moves=moves),
        Ratio(),
        times=times,
        threshold=threshold,
        least=least,
    )


def fmrg_j(
    flow: FlowMap,
    reward: Reward,
    prompts: Sequence[str] | None,
    temperature: Tensor | float,
    times: Sequence[float],
    *,
    scale: float = 0.3,
    relative: bool = True,
    brake: float | None = None,
    lookahead: int = 1,
    window: Sequence[float] = WHOLE,
    every: int = 1,
    keep_best: bool = False,
) -> Sampler:
    """Build FMRG-J's control, theory (47)."""
    potential = controlled(whole_reward(flow, reward, prompts, lookahead), times, brake=brake)
    guided = Window.of(window, every).times(times)
    made = FlowMapControl(flow, potential, times, scale, guided, relative=relative)
    return BestSeen(made, flow) if keep_best else made


def reno(
    flow: FlowMap,
    reward: Reward,
    prompts: Sequence[str] | None,
    temperature: Tensor | float,
    times: Sequence[float],
    *,
    rate: float = 0.15,
    brake: float | None = None,
    jumps: int = 1,
    finish: int | None = None,
) -> NoiseAscent:
    """Build ReNO's ascent, theory (49)."""
    potential = controlled(whole_reward(flow, reward, prompts, jumps), times, brake=brake)
    return NoiseAscent(flow, potential, len(times) - 1, rate, jumps, finish)
