"""A pipeline of a class that no family names, seen as a flow where its own call says how."""

from typing import Any

from steer.backends.pipeline import PipelineFlow

__all__ = ["generic"]


def generic(pipe: Any, **options: Any) -> PipelineFlow:
    """Return the flow of a pipeline, found out by calling it."""
    raise ValueError(f"{type(pipe).__name__} is no family that is known here")
