"""`Checks`: collect values that the host must read, and read them together.

Each read makes the host wait for the device. So numbers that must be finite are collected during a
step, and read together with the log-weights.
"""

import torch
from torch import Tensor

from steer.flow import log_dtype
from steer.guidance.population import Rows

__all__ = ["Checks"]


class Checks:
    """Numbers of a run's rows that must be finite, collected for the next read.

    Args:
        rows: rows of the run, for the names of prompts and particles in messages.
    """

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self._waiting: list[tuple[str, Tensor, str]] = []

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def add(self, what: str, values: Tensor, where: str) -> None:
        """Add numbers to the next `read`.

        Args:
            what: name of the numbers.
            values: one per row, (p * n,).
            where: step and time.
        """
        self._waiting.append((what, values, where))

    def read(self, *further: Tensor) -> list[Tensor]:
        """Check all collected numbers; copy further numbers to the host and return them.

        Raises:
            FloatingPointError: a collected number is not finite; the message names it, with
                prompt, particle and step.
        """
        waiting, self._waiting = self._waiting, []
        flags = [(~torch.isfinite(values)).any().reshape(1) for _, values, _ in waiting]
        parts = [*flags, *(values.flatten() for values in further)]
        if not parts:
            return []
        kind = log_dtype(parts[0].device)
        host = torch.cat([part.to(kind) for part in parts]).cpu()
        for flag, (what, values, where) in zip(host.tolist(), waiting, strict=False):
            if flag:
                self.rows.refuse_not_finite(what, values, where)
        sizes = [values.numel() for values in further]
        found = host[len(waiting) :].split(sizes) if sizes else ()
        return [v.reshape(like.shape) for v, like in zip(found, further, strict=True)]
