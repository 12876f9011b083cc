"""Steer and reward-tune flow maps: exact guided sampling, with any reward.

A flow map `X(s,t,x)` carries a point from time s to time t of the noise-to-data path in one
network call (t = 0 noise, t = 1 data). See `steer.sample` for the one call, and
`steer.Guidance` for its parts.
"""

from steer.ascent import FlowMapControl, NoiseAscent
from steer.cfg import ClassifierFree
from steer.control import Braked, Clipped, Normalised, Windowed
from steer.exact import GaussianMixture
from steer.finetune import finetune
from steer.flow import FlowMap
from steer.guidance import Guidance, Population
from steer.kernel import Jump, Kernel, Langevin, Sde
from steer.load import MODELS, load
from steer.lora import Adapted
from steer.noise import Noise
from steer.objectives.names import OBJECTIVES
from steer.path import Cosine, Linear, Path, VariancePreserving
from steer.potential import Denoised, Lookahead, Naive, Potential, Terminal
from steer.resampler import multinomial, residual, stratified, systematic
from steer.reward import LinearReward, QuadraticReward, Reward
from steer.sample import METHODS, Result, sample
from steer.weights import Continuous, Ratio, Weights

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
