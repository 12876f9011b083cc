"""Copy numbers from the host to a device, and make times for rows, without waiting.

A copy from pageable memory, a scalar that is read, or a mask that selects rows makes the host wait
until the device has finished all queued work. The device is then idle until the host has caught
up. A step of a sampler waits only once, where it must decide (`steer.guidance.checks`).
"""

import torch
from torch import Tensor

from steer.path import Time, as_time

__all__ = ["onto", "row_times"]

PINNED = ("cuda", "xpu")
"""Devices that copy from pinned memory asynchronously."""


def onto(values: Tensor, device: torch.device | str | None) -> Tensor:
    """Return numbers on a device; from the host without waiting, through pinned memory.

    Args:
        values: numbers, anywhere; they must not be changed afterwards.
        device: the target device. None: where the values are.
    """
    if device is None or values.device == torch.device(device):
        return values
    if values.device.type == "cpu" and torch.device(device).type in PINNED:
        values = values.pin_memory()
    return values.to(device, non_blocking=values.device.type == "cpu")


def row_times(t: Time, x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a time for each row of x, (n,), on the device of x.

    Args:
        t: a float, or a tensor () or (n,); one number is filled in by the device itself.
        x: rows (n, *event).
        dtype: of the result.
    """
    time = as_time(t)
    if time.ndim == 0 and time.device.type == "cpu":
        return torch.ones(len(x), device=x.device, dtype=dtype) * time
    return time.to(x.device, dtype).expand(len(x))
