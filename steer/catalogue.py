"""METHODS, OBJECTIVES, RULES and MODELS: all names with one line each; does not load torch."""

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
"""Embedded model -> what it generates."""

METHODS: Mapping[str, str] = MappingProxyType(
    {
        "none": "unguided: `steps` composed jumps",
        "best-of-n": "unguided candidates by `steps` composed jumps, of which the best is kept",
        "fmtt": "flow-map trajectory tilting as published: SDE drift by the lookahead's gradient, "
        "resampling on ESS (2511.22688); its log Z is biased, low in few steps",
        "denoiser": "the same, with the reward of the denoiser's mean",
        "naive": "the same, with the reward of the noisy state itself",
        "split": "exact: deterministic jump, ratio weight, resample, Metropolis-adjusted Langevin "
        "moves",
        "fmrg-j": "deterministic control: each jump is shifted along the lookahead's normalised "
        "gradient (2604.27147)",
        "reno": "gradient ascent in noise space: `steps` one-jump pictures, with the norm of the "
        "noise fixed (2406.04312)",
        "noise-smc": "exact for the map's own samples: tempered SMC in noise space, any reward",
        "renoise": "exact: jumps with churn, shifted by the gradient if there is one; "
        "ratio weights",
        "posterior": "exact: guidance and weights by the mean over posterior samples, any reward "
        "(2601.14430)",
        "tds": "exact: proposals twisted by the full reward of the denoiser (2306.17775)",
        "das": "exact: twisted proposals on a geometric ramp (2501.05803)",
        "fk": "FK steering: unguided proposals, weighted by the path's highest reward so far "
        "(2501.06848)",
        "fk-difference": "exact: the same, weighted by the gain in reward of each step",
        "fk-sum": "the same, weighted by the sum of the path's rewards so far",
        "svdd": "search: each particle samples one of its candidates by reward (2408.08252)",
        "beam": "search: the best of all candidates are kept (2511.22688)",
        "tree": "search: each particle continues from the best of its own candidates",
        "rounds": "search: repeated best-of-n, with the best picture re-noised in between",
        "dno": "gradient ascent in noise space through several jumps (2405.18881, 2402.14017)",
        "fmrg-e": "gradient ascent on the lookahead itself, without the network's gradient "
        "(2604.27147)",
        "dps": "the denoiser's gradient with the coefficient of the tilt (2209.14687)",
        "damped": "the same, reduced where the posterior is wide (2606.02884)",
        "lgd-mc": "dps with the reward averaged over noisy views (Song et al. 2023)",
        "freedom": "dps, with each step repeated after re-noising (2303.09833)",
        "ugd": "freedom, with gradient ascent on the denoised picture (2302.07121)",
        "mpgd": "gradient ascent on the denoised picture only (2311.16424)",
        "tfg": "a common form of dps to mpgd, with five parameters (2409.15761)",
    }
)
"""Sampling method -> what it does; `steer.sampling.methods.TABLE` builds them."""

OBJECTIVES: Mapping[str, str] = MappingProxyType(
    {
        "direct": "maximise the reward through one jump, or several, with penalties",
        "transport": "the transport tilt: reward against control energy (2609.27033)",
        "value": "the exponential tilt by weighted posterior samples (Meta Flow Maps, 2601.14430)",
        "amortise": "regress the map on guided samples, so that guidance is paid only once",
        "nft": "no gradient: contrastive loss on the forward process (2509.16117, 2607.15273)",
        "grpo": "no gradient: group-relative policy gradient on stochastic jumps (2607.00535)",
        "adjoint": "baseline: adjoint matching on a memoryless rollout (2409.08861)",
        "draft": "baseline: truncated backpropagation through a rollout (2309.17400)",
    }
)
"""Tuning objective -> what it does; `steer.objectives.table.TABLE` builds them."""

RULES: Mapping[str, str] = MappingProxyType(
    {
        "lsd": "Lagrangian self-distillation: the end follows the network's own velocity "
        "(2505.18825)",
        "lmd": "Lagrangian map distillation: the end follows a teacher's velocity (2406.07507)",
        "tvm": "terminal velocity matching: lsd with the running average's velocity (2511.19797)",
        "ayf-lmd": "Align Your Flow's Lagrangian form: a teacher, bounded tangents (2506.14603)",
        "heun": "discrete lmd: one Heun step of a teacher from the running average's map",
        "esd": "Eulerian self-distillation: the start follows the network's own velocity "
        "(2505.18825)",
        "emd": "Eulerian map distillation: the start follows a teacher's velocity (2406.07507)",
        "meanflow": "Eulerian, with the velocity of a (noise, data) pair (2505.13447)",
        "imf": "improved MeanFlow: derivative along the network's own velocity (2512.02012)",
        "alphaflow": "MeanFlow with a schedule that starts at flow matching (2510.20771)",
        "anyflow": "improved MeanFlow with central differences and many jumps to t = 1",
        "sct": "continuous consistency training: Eulerian, jumps to t = 1, from data (2410.11081)",
        "scd": "continuous consistency distillation: the same, from a teacher (2410.11081)",
        "ayf": "Align Your Flow: Eulerian, a teacher, bounded tangents, all pairs (2506.14603)",
        "psd-m": "progressive self-distillation: the target of a jump is two half jumps "
        "(2505.18825)",
        "psd-u": "the same, split at a uniformly random time (2505.18825)",
        "shortcut": "psd-m on dyadic times, mostly flow matching (2410.12557)",
        "splitmf": "SplitMeanFlow: psd-u, the diagonal from a teacher (2507.16884)",
        "progressive": "progressive distillation: jump lengths double during the run (2202.00512)",
    }
)
"""Training rule of maps -> what it does; `steer.training.rules.table.TABLE` builds them."""
