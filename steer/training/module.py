"""Lightning training of a flow map by a rule, with the running average of its weights.

All random numbers of step k are a function of (seed, k), so a resumed run equals an uninterrupted
one. Import it by name: `import steer` does not load Lightning.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import lightning as L
from torch import Generator, Tensor, nn

from steer.flow import FlowMap
from steer.training.average import follow
from steer.training.data import Batch, generator_of
from steer.training.optim import MuonAdamW, warm_cosine

__all__ = ["FlowTraining", "Rule", "RuleTraining"]

Rule = Callable[[FlowMap, FlowMap, Tensor, Sequence[str], Generator, float], dict[str, Tensor]]
"""(flow, average, x_1, prompts, generator, progress) -> {"loss", ...}: `steer.training.rules`."""


class RuleTraining(L.LightningModule):
    """Training by a rule: the batch of a step, its loss, and the running average after it.

    A subclass defines what is trained, what gives the targets, and what the average follows.

    Args:
        rule: the rule that gives the loss of a batch.
        batches: step -> (x_1, prompts).
        steps: length of the run.
        seed: with the step, it fixes noise and times.
        decay: decay of the running average (shorter at the start).
    """

    flow: FlowMap
    target: FlowMap

    def __init__(
        self, rule: Rule, batches: Callable[[int], Batch], steps: int, seed: int, decay: float
    ) -> None:
        super().__init__()
        self.rule, self.batches = rule, batches
        self.steps, self.seed, self.decay = steps, seed, decay

    def followed(self) -> tuple[Iterable[Tensor], Iterable[Tensor]]:
        """Return the tensors of the running average, and those that it follows."""
        raise NotImplementedError

    def training_step(self, batch: Any, index: int) -> Tensor:
        """Return the loss of the batch that belongs to the global step."""
        x_1, prompts = self.batches(self.global_step)
        rank, size = self.global_rank, self.trainer.world_size
        x_1, prompts = x_1[rank::size], prompts[rank::size]  # this process's share
        generator = generator_of(self.seed + 7919 * rank, self.global_step, 3)
        progress = self.global_step / self.steps
        terms = self.rule(
            self.flow, self.target, x_1.to(self.device), prompts, generator, progress
        )
        self.log_dict(terms, prog_bar=True, batch_size=len(x_1))
        return terms["loss"]

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Make an optimizer step, then update the running average of the weights.

        It is updated here and not at the end of the batch, because checkpoints are written before
        that.
        """
        k = self.global_step + 1
        super().optimizer_step(*args, **kwargs)
        follow(*self.followed(), self.decay, k)


class FlowTraining(RuleTraining):
    """Train a flow map by a rule, keeping the running average of its weights.

    Args:
        flow: the flow, which is trained in place.
        rule: the rule that gives the loss of a batch.
        batches: step -> (x_1, prompts).
        steps: length of the run: the rates follow a cosine to zero over it.
        seed: with the step, it fixes noise and times.
        average: decay of the running average (shorter at the start).
        muon: learning rate of the matrices.
        adamw: learning rate of the rest.
    """

    def __init__(
        self,
        flow: FlowMap,
        rule: Rule,
        batches: Callable[[int], Batch],
        *,
        steps: int,
        seed: int = 0,
        average: float = 0.998,
        muon: float = 2e-3,
        adamw: float = 1e-3,
    ) -> None:
        super().__init__(rule, batches, steps, seed, average)
        self.flow = flow
        self.average = copy.deepcopy(flow).eval().requires_grad_(False)
        self.rates = {"muon": muon, "adamw": adamw}

    @property
    def target(self) -> FlowMap:  # type: ignore[override]
        """The running average."""
        return self.average

    def followed(self) -> tuple[Iterable[Tensor], Iterable[Tensor]]:
        """Return the average's parameters and the flow's."""
        return self.average.parameters(), self.flow.parameters()

    def configure_optimizers(self) -> Any:
        """Return Muon and AdamW with 50 steps of warm-up, then a cosine to zero."""
        tables = [m.weight for m in self.flow.modules() if isinstance(m, nn.Embedding)]
        optimizer = MuonAdamW(
            [p for p in self.parameters() if p.requires_grad], **self.rates, embeddings=tables
        )
        return {"optimizer": optimizer, "lr_scheduler": warm_cosine(optimizer, self.steps)}
