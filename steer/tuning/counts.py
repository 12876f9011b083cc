"""Lightning tuning of a flow map's adapters by a reward: running average, counts, exact resume.

Student and teacher are one network, its adapters on and off. Everything that is drawn in step k is
a function of (seed, k, row): the draws know nothing of micro-batches, processes and restarts.
Import it by name: `import steer` does not load Lightning.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from steer.adapters.lora import Adapted
from steer.flow import FlowMap
from steer.path import Time
from steer.sampling.counts import Counts

__all__ = ["Metered", "TuningCounts"]


@dataclass
class TuningCounts(Counts):
    """What tuning has cost, in rows of one network call each.

    Attributes:
        weights: network gradients with respect to the adapters.
        again: calls that were recomputed in the backward pass.
        learning: whether the loss's own backward pass is under way.
    """

    weights: int = 0
    again: int = 0
    learning: bool = False

    @property
    def nfe(self) -> int:
        """Network forward-equivalents, theory (51), a gradient with respect to weights 1 more."""
        return self.forward + self.backward + self.weights + self.again


class Metered(FlowMap):
    """A flow with adapters whose calls, gradients and recomputations are counted."""

    def __init__(self, flow: Adapted, counts: TuningCounts, trained: bool = False) -> None:
        super().__init__()
        self.flow, self.counts, self.trained = flow, counts, trained
        self.path, self.event_shape = flow.path, flow.event_shape
        self.evaluations, self.name = flow.evaluations, flow.name

    def _count(self, x: Tensor, y: Tensor) -> Tensor:
        counts, rows = self.counts, self.evaluations * len(x)
        counts.forward += rows
        if y.requires_grad:
            to_input, to_weights = x.requires_grad, self.trained
            again = self.flow.checkpoint

            def add(gradient: Tensor) -> None:
                counts.backward += rows * to_input
                counts.weights += rows * (to_weights and counts.learning)
                counts.again += rows * again

            y.register_hook(add)
        return y

    def velocity(self, x: Tensor, t: Time) -> Tensor:
        """Return the flow's velocity."""
        return self._count(x, self.flow.velocity(x, t))

    def jump(self, x: Tensor, s: Time, t: Time) -> Tensor:
        """Return the flow's jump."""
        return self._count(x, self.flow.jump(x, s, t))

    def given(self, prompts: Sequence[str]) -> "Metered":
        """Bind prompts; the calls go to the same counts."""
        return Metered(self.flow.given(prompts), self.counts, self.trained)

    def decode(self, x: Tensor) -> Tensor:
        """Return the flow's images."""
        return self.flow.decode(x)
