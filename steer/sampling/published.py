"""Published methods, and two new ones, as configurations of the parts."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from steer.flow import FlowMap
from steer.guidance.ascent import NoiseAscent, Sampler, whole_reward
from steer.guidance.best_seen import BestSeen
from steer.guidance.control import Window, controlled
from steer.guidance.kernel import Jump, Sde
from steer.guidance.noise_space import NoiseSMC
from steer.guidance.posterior import PosteriorValue
from steer.guidance.potential import Denoised, Lookahead, Potential, Ramp
from steer.guidance.resampler import multinomial
from steer.guidance.search import Search
from steer.guidance.smc import Guidance
from steer.guidance.tfg import TrainingFree, smoothed
from steer.guidance.weights import FeynmanKac, Ratio
from steer.names import unknown
from steer.posterior import Glass, WeightedRenoise
from steer.ranges import not_negative
from steer.reward import Reward

__all__ = ["das", "fk", "noise_smc", "posterior", "renoise", "search", "tds", "training_free"]

WHOLE = (0.0, 1.0)

View = Literal["lookahead", "denoiser"]


def noise_smc(
    flow: FlowMap,
    reward: Reward,
    prompts: Sequence[str] | None,
    temperature: Tensor | float,
    times: Sequence[float],
    *,
    move: str | None = None,
    moves: int = 1,
    jumps: int = 1,
    fresh: float = 0.1,
    least: float = 0.5,
    bound: str = "ess",
    threshold: float = 0.7,
) -> NoiseSMC:
    """Build tempered SMC in noise space; `move` uses the gradient if there is one.

    Fails in few steps for a reward far narrower than a mode, and for modes at 1 : 1000.
    """
    view = Lookahead(flow, reward, prompts, temperature, jumps, ramp=torch.ones_like)
    chosen: Any = move or ("langevin" if view.differentiable else "pcn")
    return NoiseSMC(
        flow, view, len(times) - 1, jumps, moves, chosen, fresh, least, bound, threshold
    )


def renoise(
    flow: FlowMap,
    reward: Reward,
    prompts: Sequence[str] | None,
    temperature: Tensor | float,
    times: Sequence[float],
    *,
    churn: float = 1.0,
    scale: float = 2.0,
    clip: float | None = 1.0,
    threshold: float | Sequence[float] = 0.5,
    lookahead: int = 1,
    window: Sequence[float] = WHOLE,
    every: int = 1,
) -> Guidance:
    """Build jumps with churn, shifted by twice the published drift, and ratio weights.

    Fails for strong tilts in 50 steps and more, since the variances of the ratios add up, and for
    a strong reward that is far narrower than a mode (docs/results.md).
    """
    plain = Lookahead(flow, reward, prompts, temperature, lookahead)
    if not plain.differentiable:
        scale = 0.0
    view = controlled(plain, times, window=Window.of(window, every))
    kernel = Jump(flow, churn, clip)
    return Guidance(view, kernel, Ratio(), times=times, scale=scale, threshold=threshold)


def posterior(
    flow: FlowMap,
    reward: Reward,
    prompts: Sequence[str] | None,
    temperature: Tensor | float,
    times: Sequence[float],
    *,
    by: str = "own",
    draws: int = 4,
    inner: int = 6,
    gradient: Literal["covariance", "through"] = "covariance",
    churn: float = 1.0,
    scale: float = 2.0,
    clip: float | None = 1.0,
    threshold: float | Sequence[float] = 0.5,
) -> Guidance:
    """Build guidance by the value of posterior samples.

    Fails with 4 samples for all but weak tilts in few dimensions: errors of E_q f are 2 to 20
    times those of exact samples (docs/results.md). `by`: "map", the model's posterior map;
    "glass", with `inner` calls per sample; "renoise"; "own": its map where it has one, else GLASS.
    """
    if by == "own":
        by = "glass" if flow.posterior_map is None else "map"
    if by == "map":
        if flow.posterior_map is None:
            raise ValueError(
                "this model has no posterior map: take by=glass or by=renoise, or train one with "
                "`steer train --stages '[posterior]'`"
            )
        sampler: Any = flow.posterior_map
    elif by == "glass":
        sampler = Glass(flow, inner)
    elif by == "renoise":
        sampler = WeightedRenoise(flow, candidates=inner)
    else:
        raise unknown("sampler of the posterior", by, ("own", "map", "glass", "renoise"))
    value = PosteriorValue(flow, reward, prompts, temperature, sampler, draws, gradient)
    kernel = Jump(flow, churn, clip)
    return Guidance(value, kernel, Ratio(), times=times, scale=scale, threshold=threshold)


def training_free(
    flow: FlowMap,
    reward: Reward,
    prompts: Sequence[str] | None,
    temperature: Tensor | float,
    times: Sequence[float],
    *,
    view: View = "denoiser",
    rho: float = 1.0,
    mu: float = 0.0,
    inner: int = 1,
    recur: int = 1,
    smooth: float = 0.0,
    draws: int = 1,
    normalise: bool = False,
    damp: float | None = None,
    early: bool = False,
    cap: float = 1.0,
    clip: float | None = None,
    brake: float | None = None,
    lookahead: int = 1,
    window: Sequence[float] = WHOLE,
    every: int = 1,
    keep_best: bool = False,
) -> Sampler:
    """Build TFG's sampler, theory (71), with DPS, LGD-MC, FreeDoM, UGD, MPGD, FMRG-E as cases."""
    seen = smoothed(view, flow, reward, prompts, temperature, smooth, draws, lookahead)
    potential = controlled(seen, times, clip=clip, brake=brake)
    guided = Window.of(window, every).times(times)
    made = TrainingFree(
        flow, potential, times, rho, mu, inner, recur, normalise, damp, early, cap, guided,
        seen if smooth else None,
    )  # fmt: skip
    return BestSeen(made, flow) if keep_best else made


def _kernel(flow: FlowMap, churn: float) -> Jump:
    return Jump(flow, churn)


def _seen(
    view: View,
    flow: FlowMap,
    reward: Reward,
    prompts: Sequence[str] | None,
    temperature: Tensor | float,
    lookahead: int,
    ramp: Ramp = torch.ones_like,
) -> Potential:
    if view == "denoiser":
        return Denoised(flow, reward, prompts, temperature, ramp=ramp)
    if view == "lookahead":
        return Lookahead(flow, reward, prompts, temperature, lookahead, ramp)
    raise unknown("view", view, ("lookahead", "denoiser"))


def fk(
    flow: FlowMap,
    reward: Reward,
    prompts: Sequence[str] | None,
    temperature: Tensor | float,
    times: Sequence[float],
    *,
    kind: Literal["difference", "max", "sum"] = "max",
    view: View = "lookahead",
    churn: float = 1.0,
    threshold: float | Sequence[float] = 0.5,
    lookahead: int = 1,
) -> Guidance:
    """Build FK steering: unshifted proposals, weighted by the rewards along their paths.

    Fails for all but weak tilts: where importance sampling has an ESS of 10 %, errors of E_q f are
    2 to 8 times those of exact samples for "difference", 6 to 94 times for "max" and "sum".
    """
    seen = _seen(view, flow, reward, prompts, temperature, lookahead)
    return Guidance(
        seen, _kernel(flow, churn), FeynmanKac(kind), multinomial, times, threshold=threshold
    )


def das(
    flow: FlowMap,
    reward: Reward,
    prompts: Sequence[str] | None,
    temperature: Tensor | float,
    times: Sequence[float],
    *,
    view: View = "lookahead",
    gamma: float = 0.008,
    churn: float = 1.0,
    scale: float = 2.0,
    threshold: float | Sequence[float] = 0.5,
    lookahead: int = 1,
) -> Guidance:
    """Build DAS: twisted proposals on a ramp `(1+γ)^k - 1` that ends at 1, ratio weights.

    Of K steps, step k has `((1+γ)^(k K') - 1) / ((1+γ)^(K K') - 1)` with `K' = 100 / K`. The
    published ramp of 100 steps is not divided by its end, 1.22, but cut at 1, from step 87 on.
    Fails for cold tilts: errors of E_q f of 2 x exact ones, more for a reward narrower than a
    mode.
    """
    top = (1 + gamma) ** 100 - 1

    def ramp(t: Tensor) -> Tensor:
        return ((1 + gamma) ** (100 * t) - 1) / top

    seen = _seen(view, flow, reward, prompts, temperature, lookahead, ramp)
    scale = scale if seen.differentiable else 0.0
    return Guidance(
        seen, _kernel(flow, churn), Ratio(), times=times, scale=scale, threshold=threshold
    )


def tds(
    flow: FlowMap,
    reward: Reward,
    prompts: Sequence[str] | None,
    temperature: Tensor | float,
    times: Sequence[float],
    *,
    view: View = "denoiser",
    churn: float = 1.0,
    threshold: float | Sequence[float] = 0.5,
    lookahead: int = 1,
) -> Guidance:
    """Build the twisted diffusion sampler: the whole reward of the view twists every proposal.

    Fails in 25 steps and more, and in 10 for a strong quadratic or a kinked reward: errors of
    E_q f are 2 to 6 times those of exact samples, far more for a reward that is far narrower than
    a mode (docs/results.md).
    """
    seen = _seen(view, flow, reward, prompts, temperature, lookahead)
    kernel = Jump(flow, churn, clip=None)
    return Guidance(seen, kernel, Ratio(), times=times, scale=2.0, threshold=threshold)


def search(
    flow: FlowMap,
    reward: Reward,
    prompts: Sequence[str] | None,
    temperature: Tensor | float,
    times: Sequence[float],
    *,
    pick: Literal["softmax", "own", "best"] = "softmax",
    candidates: int = 4,
    width: int | None = None,
    view: View = "lookahead",
    churn: float = 1.0,
    noise: float | None = None,
    lookahead: int = 1,
    keep_best: bool = False,
) -> Sampler:
    """Build a search; `noise`: propose by the SDE with `eps_t = noise (1 - t)`, not by jumps."""
    seen = _seen(view, flow, reward, prompts, temperature, lookahead)
    level = not_negative("noise", noise or 0.0)
    kernel = (
        _kernel(flow, churn)
        if noise is None
        else Sde(flow, lambda t: level * (1 - t), settle=True)
    )
    made = Search(kernel, seen, times, candidates, pick, width)
    return BestSeen(made, flow) if keep_best else made


def dno(
    flow: FlowMap,
    reward: Reward,
    prompts: Sequence[str] | None,
    temperature: Tensor | float,
    times: Sequence[float],
    *,
    rate: float = 0.15,
    brake: float | None = None,
    jumps: int = 4,
    finish: int | None = None,
) -> NoiseAscent:
    """Build ascent in noise space through several jumps."""
    potential = controlled(whole_reward(flow, reward, prompts, jumps), times, brake=brake)
    return NoiseAscent(flow, potential, len(times) - 1, rate, jumps, finish)
