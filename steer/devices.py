"""Which devices torch can use here."""

import torch

__all__ = ["usable_device"]


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
