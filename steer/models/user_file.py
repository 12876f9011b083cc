"""A flow map from a Python file of the user: `file.py:Name`."""

import os
from typing import Any

import torch

from steer.doors import is_pipeline
from steer.flow import FlowMap
from steer.user_code import from_file, split_place

__all__ = ["load_user_file"]


def load_user_file(
    name: str | os.PathLike[str],
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Any:
    """Return the flow or pipeline of "file.py:Name"; None for a name of another form.

    Args:
        name: the file, and the name in it of a flow map, of a class of one, of a diffusers
            pipeline, or of a function that makes one.
        device: where to put it; by default where the file puts it.
        dtype: of its parameters; by default as the file makes them.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file has no such name; the message has the nearest ones.
        TypeError: the object in the file is neither a flow map nor a pipeline.
    """
    place = split_place(os.fspath(name))
    if place is None:
        return None
    made = from_file(*place)
    flow = made() if isinstance(made, type) or _makes(made) else made
    if is_pipeline(flow):
        return flow
    if not isinstance(flow, FlowMap):
        raise TypeError(
            f"{os.fspath(name)} gives a {type(flow).__name__}: expected a steer.FlowMap, a class "
            "of one, a diffusers pipeline, or a function without arguments that makes one"
        )
    flow = flow.to(device=device, dtype=dtype).eval().requires_grad_(False)
    flow.name = flow.name or os.fspath(name)
    return flow


def _makes(made: object) -> bool:
    return callable(made) and not isinstance(made, FlowMap) and not is_pipeline(made)
