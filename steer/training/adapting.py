"""Lightning training of adapters and a second time: a velocity model becomes a flow map.

The base is not changed, and is the teacher: the same weights at adapter scale 0. A checkpoint
holds what is trained and its running average, not the base.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from steer.adapters.lora import Adapted
from steer.training.data import Batch
from steer.training.module import Rule, RuleTraining
from steer.training.optim import warm_cosine

__all__ = ["AdapterTraining"]


class AdapterTraining(RuleTraining):
    """Train the adapters of a flow, and the term of its second time, by a rule.

    Rules that have a running average as their target take the network itself, without gradient.

    Args:
        tuned: adapters on a flow with a second time.
        term: the second time's term.
        rule: what the loss of a batch is.
        batches_on: called once the base is on its device; it returns step -> (x_1, prompts).
        steps: length of the run; the learning rate follows a cosine to zero over it.
        seed: with the step, it fixes noise and times.
        rate: AdamW's.
        average: decay of the running average (shorter at the start).
    """

    def __init__(
        self,
        tuned: Adapted,
        term: nn.Module,
        rule: Rule,
        batches_on: Callable[[], Callable[[int], Batch]],
        *,
        steps: int,
        seed: int = 0,
        rate: float = 1e-4,
        average: float = 0.99,
    ) -> None:
        super().__init__(rule, _not_yet, steps, seed, average)
        self.batches_on = batches_on
        tuned.switch.trained = (term,)
        self._tuned = [tuned]  # no submodule: the base is in no checkpoint
        own = [*tuned.adapters().values(), *term.parameters()]
        self.weighing = list(rule.parameters()) if isinstance(rule, nn.Module) else []
        self.trained = nn.ParameterList(p.requires_grad_() for p in own)
        self.mean = nn.ParameterList(nn.Parameter(p.detach().clone(), False) for p in own)
        self.rate = rate

    @property
    def tuned(self) -> Adapted:
        """The adapters on the base: `ShardedBase` splits it."""
        return self._tuned[0]

    @property
    def flow(self) -> Adapted:  # type: ignore[override]
        """The trained flow."""
        return self.tuned

    @property
    def target(self) -> Adapted:  # type: ignore[override]
        """The trained flow itself."""
        return self.tuned

    @contextmanager
    def averaged(self) -> Iterator[Adapted]:
        """Give the flow with the running average in place of what is trained."""
        now = [p.detach().clone() for p in self.trained]
        _put(self.trained, self.mean)
        try:
            yield self.flow
        finally:
            _put(self.trained, now)

    def on_fit_start(self) -> None:
        """Move the base to where the adapters are, and let it give the batches."""
        self.flow.to(self.device)
        self.batches = self.batches_on()

    def followed(self) -> tuple[Iterable[Tensor], Iterable[Tensor]]:
        """Return the average's tensors and the trained ones."""
        return self.mean, self.trained

    def configure_optimizers(self) -> Any:
        """AdamW, 50 steps up, then a cosine to zero."""
        trained = [*self.trained, *self.weighing]  # what a rule learns of its own has no average
        optimizer = torch.optim.AdamW(trained, self.rate, betas=(0.9, 0.99), weight_decay=0.0)
        return {"optimizer": optimizer, "lr_scheduler": warm_cosine(optimizer, self.steps)}


def _not_yet(step: int) -> Batch:
    raise RuntimeError("the run has not begun: its batches are those of `batches_on()`")


@torch.no_grad()
def _put(there: nn.ParameterList, values: Any) -> None:
    for p, v in zip(there, values, strict=True):
        p.copy_(v)
