"""Checks of a pipeline before it is used; each error says how to fix it."""

import inspect
from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

__all__ = [
    "check_arguments",
    "check_precision",
    "check_signature",
    "check_size",
    "default_of",
    "dtype_of",
    "multiple_of",
    "takes",
]


def check_signature(network: nn.Module, *names: str | None) -> None:
    """Refuse a denoiser without one of these arguments.

    Raises:
        TypeError: it lacks one; the message names it.
    """
    known = inspect.signature(network.forward).parameters
    for name in names:
        if name is not None and name not in known:
            raise TypeError(
                f"{type(network).__name__}.forward has no argument {name!r} (it takes "
                f"{', '.join(known)}): this release of diffusers has changed it, so install "
                "the one that this package was tested with, see docs/models.md"
            )


def check_arguments(pipe: Any, names: Iterable[str]) -> None:
    """Refuse arguments that the pipeline's call does not take.

    Raises:
        ValueError: it does not take one; the message names it and those that it takes.
    """
    known = inspect.signature(type(pipe).__call__).parameters
    if any(p.kind is p.VAR_KEYWORD for p in known.values()):
        return
    for name in names:
        if name not in known:
            raise ValueError(
                f"{type(pipe).__name__} takes no argument {name!r}: it takes "
                f"{', '.join(k for k in known if k != 'self')}"
            )


def check_precision(network: nn.Module) -> None:
    """Refuse a precision in which the denoiser's device cannot compute matrix products.

    Raises:
        ValueError: it cannot; the message says which precision works.
    """
    p = next(network.parameters())
    if p.dtype not in (torch.float16, torch.bfloat16) or p.device.type == "meta":
        return
    try:
        small = torch.ones(1, 1, 2, 2, device=p.device, dtype=p.dtype)
        torch.nn.functional.conv2d(small @ small, small)
    except RuntimeError as error:
        kind = str(p.dtype).removeprefix("torch.")
        raise ValueError(
            f"{kind} does not work on {p.device.type} here ({error}): load the pipeline with "
            "dtype=torch.float32, or put it on a device that has it"
        ) from None


def check_size(pipe: Any, height: int | None, width: int | None, multiple: int) -> None:
    """Raise an error for a height or width that is not a multiple of what the pipeline needs.

    Raises:
        ValueError: it is not a multiple; the message names the nearest ones.
    """
    for name, size in {"height": height, "width": width}.items():
        if size is not None and (size <= 0 or size % multiple):
            low = max(1, size // multiple) * multiple
            raise ValueError(
                f"{name} {size} is not a multiple of {multiple}, which {type(pipe).__name__} "
                f"needs: take {low} or {low + multiple}"
            )


def multiple_of(pipe: Any, network: Any, patches: bool) -> int:
    """Return the number that divides height and width: autoencoder scale times patch size."""
    scale = int(getattr(pipe, "vae_scale_factor", None) or 8)
    if patches:
        return 2 * scale
    patch = getattr(network.config, "patch_size", None) or 1
    return scale * int(patch[-1] if isinstance(patch, list | tuple) else patch)


def takes(pipe: Any, argument: str) -> bool:
    """Return whether the pipeline's call has an argument of this name."""
    return argument in inspect.signature(type(pipe).__call__).parameters


_DTYPES: WeakKeyDictionary[nn.Module, tuple[torch.dtype, torch.dtype]] = WeakKeyDictionary()


def dtype_of(module: Any) -> torch.dtype:
    """Return the precision that diffusers reports for a module, cached.

    diffusers iterates over all parameters at each call. The cached value is renewed if the first
    parameter has another dtype.
    """
    first = next(module.parameters()).dtype
    known = _DTYPES.get(module)
    if known is None or known[0] != first:
        known = _DTYPES[module] = first, module.dtype
    return known[1]


def default_of(pipe: Any, argument: str | None) -> float | None:
    """Return the default of a numeric argument of the pipeline's call; None if it has none."""
    known = inspect.signature(type(pipe).__call__).parameters.get(argument or "")
    found = None if known is None else known.default
    return float(found) if isinstance(found, int | float) else None
