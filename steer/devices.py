"""Which devices torch can use here, and which attention kernels a gradient may use."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

import torch

__all__ = ["differentiating", "usable_device"]


def usable_device(device: str | torch.device | None) -> None:
    """Raise if torch has no such device.

    Raises:
        ValueError: it has none, or the name is not that of a device.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device {str(device)!r} cannot be used here ({str(error).splitlines()[0]}): give "
            "cpu (--device cpu), or cuda where torch sees one"
        ) from error


@contextmanager
def differentiating() -> Iterator[None]:
    """Turn gradients on, and cuDNN's attention off, until the context is left.

    On NVIDIA's Hopper cards torch takes cuDNN's attention for half precision, and its backward
    pass returns NaN at some lengths of the sequence (pytorch/pytorch issue 196678). Flash
    and memory-efficient attention take its place. The setting is one for the whole process, so it
    is put back when the last of several threads has left.
    """
    _CUDNN.hold()
    try:
        with torch.enable_grad():
            yield
    finally:
        _CUDNN.release()


class _Off:
    """cuDNN's attention, off from the first of several threads' `hold` to the last `release`."""

    def __init__(self) -> None:
        self.lock, self.holders, self.chosen = Lock(), 0, True

    def hold(self) -> None:
        with self.lock:
            if not self.holders:
                self.chosen = torch.backends.cuda.cudnn_sdp_enabled()
                torch.backends.cuda.enable_cudnn_sdp(False)
            self.holders += 1

    def release(self) -> None:
        with self.lock:
            self.holders -= 1
            if not self.holders:
                torch.backends.cuda.enable_cudnn_sdp(self.chosen)


_CUDNN = _Off()
