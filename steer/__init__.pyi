# What `import steer` offers, and where it lives: read by steer/__init__.py when a name is used.
from . import (
    adapters as adapters,
)
from . import (
    batches as batches,
)
from . import (
    catalogue as catalogue,
)
from . import (
    exact as exact,
)
from . import (
    files as files,
)
from . import (
    flow as flow,
)
from . import (
    guidance as guidance,
)
from . import (
    models as models,
)
from . import (
    names as names,
)
from . import (
    noise as noise,
)
from . import (
    objectives as objectives,
)
from . import (
    path as path,
)
from . import (
    pictures as pictures,
)
from . import (
    posterior as posterior,
)
from . import (
    reward as reward,
)
from . import (
    sampling as sampling,
)
from . import (
    secrets as secrets,
)
from . import (
    testing as testing,
)
from . import (
    training as training,
)
from . import (
    tuning as tuning,
)
from .adapters.lora import Adapted as Adapted
from .backends.dropin import RewardGuidance as RewardGuidance
from .catalogue import METHODS as METHODS
from .catalogue import MODELS as MODELS
from .catalogue import OBJECTIVES as OBJECTIVES
from .catalogue import RULES as RULES
from .doors import compare as compare
from .doors import evaluate as evaluate
from .exact import GaussianMixture as GaussianMixture
from .film import Film as Film
from .film import animation as animation
from .film import filmstrip as filmstrip
from .film import movie as movie
from .flow import FlowMap as FlowMap
from .flow import Wrapped as Wrapped
from .guidance.ascent import FlowMapControl as FlowMapControl
from .guidance.ascent import NoiseAscent as NoiseAscent
from .guidance.control import (
    Braked as Braked,
)
from .guidance.control import (
    Clipped as Clipped,
)
from .guidance.control import (
    Normalised as Normalised,
)
from .guidance.control import (
    Windowed as Windowed,
)
from .guidance.kernel import Jump as Jump
from .guidance.kernel import Kernel as Kernel
from .guidance.kernel import Langevin as Langevin
from .guidance.kernel import Sde as Sde
from .guidance.population import Population as Population
from .guidance.potential import (
    Denoised as Denoised,
)
from .guidance.potential import (
    Lookahead as Lookahead,
)
from .guidance.potential import (
    Naive as Naive,
)
from .guidance.potential import (
    Potential as Potential,
)
from .guidance.potential import (
    Terminal as Terminal,
)
from .guidance.resampler import (
    multinomial as multinomial,
)
from .guidance.resampler import (
    residual as residual,
)
from .guidance.resampler import (
    stratified as stratified,
)
from .guidance.resampler import (
    systematic as systematic,
)
from .guidance.smc import Guidance as Guidance
from .guidance.weights import Continuous as Continuous
from .guidance.weights import Ratio as Ratio
from .guidance.weights import Weights as Weights
from .models.classifier_free import ClassifierFree as ClassifierFree
from .models.loading import load as load
from .models.pair import Pair as Pair
from .models.posterior_unet import load_posterior as load_posterior
from .noise import Noise as Noise
from .one_time import OneTime as OneTime
from .path import (
    Cosine as Cosine,
)
from .path import (
    Linear as Linear,
)
from .path import (
    Path as Path,
)
from .path import (
    VariancePreserving as VariancePreserving,
)
from .planning.plan import plan as plan
from .posterior import Glass as Glass
from .posterior import PosteriorMap as PosteriorMap
from .posterior import WeightedRenoise as WeightedRenoise
from .ranks import Ranks as Ranks
from .reward import (
    LinearReward as LinearReward,
)
from .reward import (
    QuadraticReward as QuadraticReward,
)
from .reward import (
    Reward as Reward,
)
from .sampling.result import Result as Result
from .sampling.run import sample as sample
from .sampling.run import stream as stream
from .tuning.run import finetune as finetune

__version__: str

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
    "Film",
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
    "OneTime",
    "Pair",
    "Path",
    "Population",
    "Potential",
    "QuadraticReward",
    "Ranks",
    "Ratio",
    "Result",
    "Reward",
    "Sde",
    "Terminal",
    "VariancePreserving",
    "Weights",
    "Windowed",
    "Wrapped",
    "animation",
    "filmstrip",
    "finetune",
    "load",
    "load_posterior",
    "movie",
    "multinomial",
    "plan",
    "residual",
    "sample",
    "stratified",
    "stream",
    "systematic",
]
