"""METHODS, OBJECTIVES, RULES and MODELS: every name with its line, importable without torch."""

from collections.abc import Mapping
from types import MappingProxyType

__all__ = ["METHODS", "MODELS", "OBJECTIVES", "RULES"]

MODELS: Mapping[str, str] = MappingProxyType(
    {
        "emoji": "307 animals, plants, foods, drinks and faces in four drawing styles, "
        "32x32 pixels",
        "emoji-diffusers": "the same pictures by a Stable Diffusion pipeline of diffusers' own "
        "classes, and a map of it",
        "fashion": "ten kinds of clothes in grey, 28x28 pixels (Fashion-MNIST), with a posterior "
        "map",
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
        "noise-smc": "exact for the map's own samples: tempered SMC in noise space, any reward",
        "renoise": "exact: jumps with churn, shifted by the gradient where there is one; "
        "ratio weights",
        "posterior": "exact: the reward's mean over posterior draws guides and weighs, any reward "
        "(2601.14430)",
        "tds": "exact: every proposal twisted by the whole reward of the denoiser (2306.17775)",
        "das": "exact: twisted proposals on a geometric ramp (2501.05803)",
        "fk": "FK steering: unguided proposals, weighed by the most a path has seen (2501.06848)",
        "fk-difference": "exact: the same, weighed by what each step gains",
        "fk-sum": "the same, weighed by the sum of what a path has seen",
        "svdd": "search: each particle draws one of its candidates by the reward (2408.08252)",
        "beam": "search: the best of all candidates go on (2511.22688)",
        "tree": "search: each particle goes on from the best of its own candidates",
        "rounds": "search: best-of-n again and again, the best one re-noised in between",
        "dno": "ascent in noise space through several jumps (2405.18881, 2402.14017)",
        "fmrg-e": "ascent of the lookahead itself, without the network's gradient (2604.27147)",
        "dps": "the denoiser's gradient by the tilt's own coefficient (2209.14687)",
        "damped": "the same through the lookahead, less where the posterior is wide (2606.02884)",
        "lgd-mc": "dps with the reward averaged over blurred views (Song et al. 2023)",
        "freedom": "dps, each step made twice, re-noised in between (2303.09833)",
        "ugd": "freedom, and ascent of the denoised picture (2302.07121)",
        "mpgd": "ascent of the denoised picture alone (2311.16424)",
        "tfg": "all of dps to mpgd in five numbers (2409.15761)",
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

RULES: Mapping[str, str] = MappingProxyType(
    {
        "lsd": "Lagrangian self-distillation: the end moves with the network's own velocity "
        "(2505.18825)",
        "lmd": "Lagrangian map distillation: the end moves with a teacher's velocity (2406.07507)",
        "tvm": "terminal velocity matching: lsd on the running average's velocity (2511.19797)",
        "ayf-lmd": "Align Your Flow's Lagrangian form: a teacher, tangents in bounds (2506.14603)",
        "heun": "discrete lmd: one Heun step of a teacher from the running average's map",
        "esd": "Eulerian self-distillation: the start moves with the network's own velocity "
        "(2505.18825)",
        "emd": "Eulerian map distillation: the start moves with a teacher's velocity (2406.07507)",
        "meanflow": "Eulerian, from the pair's velocity (2505.13447)",
        "imf": "improved MeanFlow: the derivative along the network's own velocity (2512.02012)",
        "alphaflow": "MeanFlow by a curriculum from flow matching (2510.20771)",
        "anyflow": "improved MeanFlow by central differences, many jumps to the end",
        "sct": "continuous consistency training: Eulerian to the end, from data (2410.11081)",
        "scd": "continuous consistency distillation: the same, from a teacher (2410.11081)",
        "ayf": "Align Your Flow: Eulerian, a teacher, tangents in bounds, all pairs (2506.14603)",
        "psd-m": "progressive self-distillation: two half jumps teach one (2505.18825)",
        "psd-u": "the same, split at a uniform place (2505.18825)",
        "shortcut": "psd-m on dyadic times, mostly flow matching (2410.12557)",
        "splitmf": "SplitMeanFlow: psd-u, the diagonal from a teacher (2507.16884)",
        "progressive": "progressive distillation: gaps double as the run goes on (2202.00512)",
    }
)
"""Rule of map training -> what it does; `steer.training.rules.table.TABLE` builds them."""
