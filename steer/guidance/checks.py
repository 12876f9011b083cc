"""`Checks`: what a step must look at on the host, looked at together.

Each look makes the host wait for the device. So numbers that must be finite are collected while a
step is made, and read at once with what the step decides by: the log-weights.
"""

import torch
from torch import Tensor

from steer.flow import log_dtype
from steer.guidance.population import Rows

__all__ = ["Checks"]


class Checks:
    """Numbers of a run's rows that must be finite, waiting to be looked at.

    Args:
        rows: of the run; they know prompts and particles by name.
    """

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self._waiting: list[tuple[str, Tensor, str]] = []

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def add(self, what: str, values: Tensor, where: str) -> None:
        """Let numbers be looked at by the next `read`.

        Args:
            what: what they are.
            values: one a row, (p * n,).
            where: step and time.
        """
        self._waiting.append((what, values, where))

    def read(self, *further: Tensor) -> list[Tensor]:
        """Look at all that waits, and at further numbers, in one copy; return these on the host.

        Raises:
            FloatingPointError: something that waited is not finite; the message names it, with
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
