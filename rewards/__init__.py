"""Rewards for steering: load one by name, wrap a function, add them up.

>>> import rewards
>>> reward = rewards.load("0.7*brightness - 0.3*colour:name=red")
>>> reward.differentiable
True

Names are imported on first use (`rewards/__init__.pyi` lists where each is defined). The first
reward loads torch; heavier packages are loaded only when a reward needs them.
"""

import lazy_loader

from steer.names import moved

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

moved(
    "rewards",
    {
        "aesthetic": ["rewards.models.aesthetic", "rewards.models.weights"],
        "algebra": ["rewards.combine.algebra", "rewards.combine.normalised"],
        "augment": ["rewards.combine.augment", "rewards.pixels.views"],
        "backbone": [
            "rewards.models.backbone",
            "rewards.models.towers",
            "rewards.models.cosine",
            "rewards.models.weights",
            "rewards.models.instances",
            "rewards.models.hub",
        ],
        "check": ["rewards.checking"],
        "classifier": ["rewards.models.classifier"],
        "clip": ["rewards.models.clip"],
        "colour": ["rewards.pixels.colour"],
        "dino": ["rewards.models.dino"],
        "form": ["rewards.pixels.form"],
        "hpsv2": ["rewards.models.hpsv2"],
        "hub": ["rewards.models.hub"],
        "imagereward": ["rewards.models.imagereward"],
        "jpeg": ["rewards.pixels.jpeg"],
        "known": ["rewards.gradient"],
        "load": ["rewards.loading"],
        "lpips": ["rewards.models.lpips"],
        "mps": ["rewards.models.mps", "rewards.models.crossed"],
        "names": ["steer.reward"],
        "pickscore": ["rewards.models.pickscore"],
        "preprocess": ["rewards.models.preprocess"],
        "prompts": ["rewards.models.prompts"],
        "reference": ["rewards.pixels.reference"],
        "remote": ["rewards.serving.remote", "rewards.serving.protocol"],
        "serve": ["rewards.serving.serve", "rewards.serving.application"],
        "siglip": ["rewards.models.siglip"],
        "tone": ["rewards.pixels.tone"],
        "vqa": ["rewards.models.vqa", "rewards.models.vision_language"],
    },
)
