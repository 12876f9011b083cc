"""METHODS, OBJECTIVES and MODELS: every name with its line, importable without torch."""

from collections.abc import Mapping
from types import MappingProxyType

__all__ = ["METHODS", "MODELS", "OBJECTIVES"]

MODELS: Mapping[str, str] = MappingProxyType(
    {
        "emoji": "307 animals, plants, foods, drinks and faces in four drawing styles, "
        "32x32 pixels",
        "emoji-diffusers": "the same pictures by a Stable Diffusion pipeline of diffusers' own "
        "classes, and a map of it",
    }
)
"""Embedded model -> what it draws."""

METHODS: Mapping[str, str] = MappingProxyType(
    {
        "none": "unguided: `steps` composed jumps",
        "best-of-n": "unguided candidates by `steps` composed jumps, the best one wins",
        "fmtt": "flow-map trajectory tilting as published: SDE drift by the lookahead's gradient, "
        "resampling on ESS (2511.22688); its log Z is biased, low in few steps",
        "denoiser": "the same, with the reward seen through the denoiser",
        "naive": "the same, with the reward of the noisy state itself",
        "split": "exact: deterministic jump, ratio weight, resample, Metropolis-adjusted Langevin "
        "moves",
        "fmrg-j": "deterministic control: jumps pushed up the lookahead's normalised gradient "
        "(2604.27147)",
        "reno": "ascent in noise space: `steps` looks at the one-jump picture, the noise's norm "
        "kept (2406.04312)",
    }
)
"""Sampling method -> what it does; `steer.sampling.methods.TABLE` builds them."""

OBJECTIVES: Mapping[str, str] = MappingProxyType(
    {
        "direct": "ascent of the reward through one jump, or several, with penalties",
        "transport": "the transport tilt: reward against control energy (2609.27033)",
        "value": "the exponential tilt by weighted posterior draws (Meta Flow Maps, 2601.14430)",
        "amortise": "guidance paid once: regress the map on a guided population",
        "nft": "no gradient: forward-process contrast on the map (2509.16117, 2607.15273)",
        "grpo": "no gradient: group-relative, anchored stochastic jumps (2607.00535)",
        "adjoint": "baseline: adjoint matching on a memoryless rollout (2409.08861)",
        "draft": "baseline: truncated backpropagation through a rollout (2309.17400)",
    }
)
"""Tuning objective -> what it does; `steer.objectives.table.TABLE` builds them."""
