"""The families of pipelines, by class."""

import inspect
from typing import Any

from steer.backends.flow_matching import (
    DreamLite,
    Ernie,
    Flux,
    Flux2Klein,
    Krea2,
    Prx,
    QwenImage,
    RectifiedUNet,
    Sana,
    SanaSprint,
    StableDiffusion3,
    Wan,
    ZImage,
)
from steer.backends.noise_prediction import StableDiffusion
from steer.backends.pipeline import PipelineFlow
from steer.backends.two_time import AnyFlow, Flux3, HunyuanImage
from steer.names import unknown

__all__ = ["FAMILIES", "family_of", "flow_of"]

FAMILIES: dict[str, type[PipelineFlow]] = {
    "Flux3DistilledModularPipeline": Flux3,
    "Flux3ModularPipeline": Flux3,
    "FluxPipeline": Flux,
    "StableDiffusionXLPipeline": StableDiffusion,
    "StableDiffusionPipeline": StableDiffusion,
    "LatentConsistencyModelPipeline": StableDiffusion,
    "SanaSprintPipeline": SanaSprint,
    "SanaPipeline": Sana,
    "StableDiffusion3Pipeline": StableDiffusion3,
    "Flux2KleinPipeline": Flux2Klein,
    "HunyuanImagePipeline": HunyuanImage,
    "AnyFlowPipeline": AnyFlow,
    "QwenImagePipeline": QwenImage,
    "ZImagePipeline": ZImage,
    "WanPipeline": Wan,
    "PRXPipeline": Prx,
    "ErnieImagePipeline": Ernie,
    "Krea2Pipeline": Krea2,
    "DreamLiteMobilePipeline": DreamLite,
}
"""The pipeline's class -> the family; names of base classes match as well."""


def family_of(pipe: Any) -> type[PipelineFlow] | None:
    """Return the family of a pipeline's class; None for a class that is not in the table."""
    names = (kind.__name__ for kind in type(pipe).__mro__)
    found = next((FAMILIES[name] for name in names if name in FAMILIES), None)
    if found is StableDiffusion:
        predicts = pipe.scheduler.config.get("prediction_type")
        return RectifiedUNet if predicts == "flow_prediction" else found
    return found


def flow_of(pipe: Any, **options: Any) -> PipelineFlow:
    """Return a pipeline as a flow map.

    Args:
        pipe: the pipeline.
        **options: those of `PipelineFlow`.

    Raises:
        ValueError: an unknown option, with the nearest names; see `PipelineFlow` and `generic`.
    """
    known = inspect.signature(PipelineFlow).parameters
    for name in options:
        if name not in known or name == "pipe":
            raise unknown("option", name, [k for k in known if k != "pipe"])
    kind = family_of(pipe)
    if kind is not None:
        return kind(pipe, **options)
    from steer.backends.generic import generic

    return generic(pipe, **options)
