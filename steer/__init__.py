"""Steer and reward-tune flow maps: exact guided sampling, with any reward.

A flow map `X(s,t,x)` carries a point from time s to time t of the noise-to-data path in one
network call (t = 0 noise, t = 1 data). See `steer.sample` for the one call, and
`steer.Guidance` for its parts.
"""

from steer.adapters.lora import Adapted
from steer.exact import GaussianMixture
from steer.flow import FlowMap
from steer.guidance.ascent import FlowMapControl, NoiseAscent
from steer.guidance.control import Braked, Clipped, Normalised, Windowed
from steer.guidance.kernel import Jump, Kernel, Langevin, Sde
from steer.guidance.population import Population
from steer.guidance.potential import Denoised, Lookahead, Naive, Potential, Terminal
from steer.guidance.resampler import multinomial, residual, stratified, systematic
from steer.guidance.smc import Guidance
from steer.guidance.weights import Continuous, Ratio, Weights
from steer.models.classifier_free import ClassifierFree
from steer.models.loading import MODELS, load
from steer.noise import Noise
from steer.objectives.table import OBJECTIVES
from steer.path import Cosine, Linear, Path, VariancePreserving
from steer.reward import LinearReward, QuadraticReward, Reward
from steer.sampling.methods import METHODS
from steer.sampling.result import Result
from steer.sampling.run import sample
from steer.tuning.run import finetune

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "MODELS",
    "OBJECTIVES",
    "Adapted",
    "Braked",
    "ClassifierFree",
    "Clipped",
    "Continuous",
    "Cosine",
    "Denoised",
    "FlowMap",
    "FlowMapControl",
    "GaussianMixture",
    "Guidance",
    "Jump",
    "Kernel",
    "Langevin",
    "Linear",
    "LinearReward",
    "Lookahead",
    "Naive",
    "Noise",
    "NoiseAscent",
    "Normalised",
    "Path",
    "Population",
    "Potential",
    "QuadraticReward",
    "Ratio",
    "Result",
    "Reward",
    "Sde",
    "Terminal",
    "VariancePreserving",
    "Weights",
    "Windowed",
    "finetune",
    "load",
    "multinomial",
    "residual",
    "sample",
    "stratified",
    "systematic",
]
