"""Compute a micro-batch's gradient in parts if the device has too little memory for all rows.

The loss of a micro-batch is a mean over its rows, so with parts of m_i of m rows

    d loss / d θ = Σ_i m_i / m  d loss_i / d θ,

and a row's random numbers do not depend on the other rows of its call: the gradient is the same up
to rounding.
"""

import warnings
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from steer.batches import too_large
from steer.objectives.batch import Objective
from steer.reward import learners

__all__ = ["Halving", "advice"]

Terms = dict[str, Tensor]


class _Known(torch.autograd.Function):
    """A loss with a precomputed gradient, which its backward pass passes to the parameters."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *_: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        return None, None, *(g * upstream for g in ctx.gradients)


class Halving:
    """Compute a micro-batch's gradient in parts, and halve the parts if memory is too small.

    The part size that fits is kept for the rest of the run, with one warning. A failed part does
    not change the run's counts and scales.

    Args:
        module: the `RewardTuning`.
    """

    def __init__(self, module: Any) -> None:
        self._module = [module]  # in a list, so that it is not registered as a submodule
        self.rows: int | None = None
        self._told = False

    @staticmethod
    def applies(objective: Objective, sharded: bool) -> bool:
        """Return whether parts give the same gradient, and processes may make different calls."""
        return objective.per_call is False and not (objective.uneven or sharded)

    def loss(self, step: int, first: int, last: int) -> tuple[Tensor, Terms, list[Any]]:
        """Return a micro-batch's loss, the means of its terms, and the rewards.

        The loss passes its gradient to the adapters when Lightning runs its backward pass.

        Args:
            step: the optimizer step.
            first: index of the micro-batch's first row.
            last: index after its last row.

        Raises:
            torch.OutOfMemoryError: one group of rows is too much.
        """
        group, whole = self._module[0].objective.group, last - first
        terms: dict[str, Tensor] = {}
        gradients: dict[str, Tensor] = {}
        seen: list[Any] = []
        failed = 0
        while first < last:
            rows = min(last - first, self.rows or whole)
            lower = False
            try:
                part = self._part(step, first, first + rows)
            except RuntimeError as error:
                if rows <= group or not too_large(error):
                    raise
                lower = True  # continue below: here the failed call's tensors are still alive
            if lower:
                failed = failed or rows
                self.rows = max(group, rows // 2 // group * group)
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                continue
            share = rows / whole
            for sums, found in ((terms, part[0]), (gradients, part[1])):
                for name, value in found.items():
                    scaled = value if share == 1 else share * value
                    sums[name] = sums[name] + scaled if name in sums else scaled
            seen += part[2]
            first += rows
            if failed:
                self._tell(failed)
        adapters = self._module[0].tuned.adapters()
        used = [adapters[name] for name in gradients]
        return _Known.apply(terms["loss"], list(gradients.values()), *used), terms, seen

    def _part(self, step: int, first: int, last: int) -> tuple[Terms, Terms, list[Any]]:
        """Return the terms, the gradients by the adapters' names, and the rewards."""
        module = self._module[0]
        counts, parts = module.counts, learners(module.reward)
        before, noted = asdict(counts), [part.noted.clone() for part in parts]
        try:
            drawn = module.batch(step, first, last)
            found = module.objective(drawn)
            terms = {name: value.detach().float() for name, value in found.items()}
            counts.learning = True
            gradients = self._gradients(found["loss"])
        except BaseException:
            for name, value in before.items():
                setattr(counts, name, value)
            for part, value in zip(parts, noted, strict=True):
                part.noted = value
            raise
        finally:
            counts.learning = False
        return terms, gradients, drawn.seen

    def _gradients(self, loss: Tensor) -> dict[str, Tensor]:
        """Return the gradients of a loss by adapter name, computed as Lightning would."""
        module = self._module[0]
        named = {n: p for n, p in module.tuned.adapters().items() if p.requires_grad}
        plugin = None if module._trainer is None else module.trainer.precision_plugin
        scaler = getattr(plugin, "scaler", None)  # float16: small gradients would underflow
        factor = 1.0 if scaler is None else scaler.get_scale()
        with torch.autocast(loss.device.type, enabled=False):
            made = torch.autograd.grad(
                loss if factor == 1 else loss * factor, list(named.values()), allow_unused=True
            )
        return {
            name: g if factor == 1 else g / factor
            for name, g in zip(named, made, strict=True)
            if g is not None
        }

    def _tell(self, before: int) -> None:
        if self._told:
            return
        self._told = True
        warnings.warn(
            f"out of memory at {before} rows a call: going on with {self.rows}, to the same "
            f"gradient. To begin so, give micro_batch={self.rows} (--micro-batch); `steer plan` "
            "says what else saves memory",
            stacklevel=2,
        )


def advice(objective: Objective, rows: int, sharded: bool) -> str:
    """Return what to do if a call has too many rows for the memory and cannot be halved.

    Args:
        objective: objective of the run.
        rows: rows of the call.
        sharded: whether the base is sharded over processes.
    """
    why = "this objective compares the rows of a call"
    if sharded:
        why = "the processes of a split base make their calls together"
    elif objective.uneven:
        why = "this objective samples inside its calls"
    elif objective.per_call is None:
        why = "this objective does not say, by per_call = False, that its loss is a mean"
    fewer = rows // 2 // objective.group * objective.group
    what = f"give micro_batch={fewer} (--micro-batch)"
    if not fewer:
        what = (
            "they are the fewest that this objective can take: load the base in a lower "
            "precision, or tune with checkpointing"
        )
    return (
        f"{rows} rows a call are too many here, and this run cannot halve them by itself ({why}): "
        f"{what}, or see `steer plan`"
    )
