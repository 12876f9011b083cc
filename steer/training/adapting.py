"""Lightning training of adapters and a second time, which make a velocity model a flow map.

The base is not changed, and is the teacher: the same weights at adapter scale 0. A checkpoint
holds the trained tensors and their running average, not the base.
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

    Rules whose target is the running average use the network itself here, without gradient.

    Args:
        tuned: adapters on a flow with a second time.
        term: the term of the second time.
        rule: the rule that gives the loss of a batch.
        batches_on: called once the base is on its device; it returns step -> (x_1, prompts).
        steps: length of the run; the learning rate follows a cosine to zero over it.
        seed: with the step, it fixes noise and times.
        rate: learning rate of AdamW.
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
        self._tuned = [tuned]  # not a submodule, so that checkpoints do not contain the base
        own = [*tuned.adapters().values(), *term.parameters()]
        self.weighing = list(rule.parameters()) if isinstance(rule, nn.Module) else []
        self.trained = nn.ParameterList(p.requires_grad_() for p in own)
        self.mean = nn.ParameterList(nn.Parameter(p.detach().clone(), False) for p in own)
        self.rate = rate

    @property
    def tuned(self) -> Adapted:
        """The adapters on the base, which `ShardedBase` splits."""
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
        """Yield the flow with the running average in place of the trained tensors."""
        now = [p.detach().clone() for p in self.trained]
        _put(self.trained, self.mean)
        try:
            yield self.flow
        finally:
            _put(self.trained, now)

    def on_fit_start(self) -> None:
        """Move the base to the adapters' device, and let it make the batches."""
        self.flow.to(self.device)
        self.batches = self.batches_on()

    def followed(self) -> tuple[Iterable[Tensor], Iterable[Tensor]]:
        """Return the average's tensors and the trained ones."""
        return self.mean, self.trained

    def configure_optimizers(self) -> Any:
        """Return AdamW with 50 steps of warm-up, then a cosine to zero."""
        trained = [*self.trained, *self.weighing]  # the rule's have no average
        optimizer = torch.optim.AdamW(trained, self.rate, betas=(0.9, 0.99), weight_decay=0.0)
        return {"optimizer": optimizer, "lr_scheduler": warm_cosine(optimizer, self.steps)}


def _not_yet(step: int) -> Batch:
    raise RuntimeError("the run has not begun: its batches are those of `batches_on()`")


@torch.no_grad()
def _put(there: nn.ParameterList, values: Any) -> None:
    for p, v in zip(there, values, strict=True):
        p.copy_(v)
