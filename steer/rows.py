"""Rows of several prompts, prompt-major, and the precision of their weights."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["flat_prompts", "log_dtype", "per_row"]


def per_row(values: Tensor, rows: int, name: str = "values") -> Tensor:
    """Repeat p values (p, ...) for `rows` prompt-major rows: row i gets value i // (rows / p)."""
    if rows % len(values):
        raise ValueError(
            f"{rows} rows do not split evenly over {len(values)} {name}: give p * n rows, "
            "prompt-major (row i belongs to prompt i // n)"
        )
    return values.repeat_interleave(rows // len(values), 0)


def flat_prompts(prompts: Sequence[str], rows: int) -> list[str]:
    """Repeat each of p prompts for its rows.

    >>> flat_prompts(["a", "b"], 4)
    ['a', 'a', 'b', 'b']
    """
    index = per_row(torch.arange(len(prompts)), rows, "prompts")
    return [prompts[i] for i in index.tolist()]


def log_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of log-weights: float64 if the device has it.

    With float32 a reward with a large offset loses precision: at 1e6 the resolution is .06.
    """
    return torch.float32 if device.type == "mps" else torch.float64
