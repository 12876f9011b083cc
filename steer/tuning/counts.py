"""Count the cost of tuning: calls, gradients of inputs and weights, and recomputations."""

from dataclasses import dataclass

from torch import Tensor

from steer.adapters.lora import Adapted
from steer.flow import Wrapped
from steer.path import Time
from steer.sampling.counts import Counts, passes

__all__ = ["Metered", "TuningCounts"]


@dataclass
class TuningCounts(Counts):
    """The cost of tuning so far, in rows of one network call each.

    Attributes:
        weights: network gradients with respect to the adapters.
        again: calls that were recomputed in the backward pass.
        learning: whether the backward pass of the loss is running.
    """

    weights: int = 0
    again: int = 0
    learning: bool = False

    @property
    def nfe(self) -> int:
        """Network forward-equivalents, theory (51), a gradient with respect to weights 1 more."""
        return self.forward + self.backward + self.weights + self.again


class Metered(Wrapped):
    """A flow with adapters whose calls, gradients and recomputations are counted.

    Args:
        flow: the flow at some scale.
        counts: what is added to; views by `given` share it.
        trained: whether its adapters have gradients.
    """

    def __init__(self, flow: Adapted, counts: TuningCounts, trained: bool = False) -> None:
        super().__init__(flow)
        self.counts, self.trained, self.again = counts, trained, flow.checkpoint

    def call(self, name: str, x: Tensor, *times: Time) -> Tensor:
        """Call the flow, and count; gradients are counted when they are computed."""
        y = super().call(name, x, *times)
        counts, rows = self.counts, self.calls(name, *times) * len(x)
        counts.forward += rows * passes(y)
        if y.requires_grad:
            to_input, to_weights, again = x.requires_grad, self.trained, self.again

            def add(gradient: Tensor) -> None:
                counts.backward += rows * to_input
                counts.weights += rows * (to_weights and counts.learning)
                counts.again += rows * again

            y.register_hook(add)
        return y
