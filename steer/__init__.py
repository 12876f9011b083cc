"""Steer and reward-tune flow maps: exact guided sampling, with any reward.

A flow map `X(s,t,x)` carries a point from time s to time t of the noise-to-data path in one
network call (t = 0 noise, t = 1 data). `steer.sample` does guided sampling in a single call;
`steer.Guidance` combines its parts.

Names are imported on first use; `steer/__init__.pyi` lists where each is defined.
"""

import lazy_loader

from steer.names import moved

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

moved(
    __name__,
    {
        "kernel": ["steer.guidance.kernel"],
        "load": ["steer.models.loading"],
        "lora": [
            "steer.adapters.lora",
            "steer.adapters.inject",
            "steer.adapters.merge",
            "steer.adapters.store",
            "steer.adapters.fingerprint",
            "steer.adapters.config",
            "steer.files",
        ],
        "methods": ["steer.sampling.methods", "steer.sampling.forecast", "steer.path"],
    },
)
