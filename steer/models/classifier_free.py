"""Classifier-free guidance that is mixed at run time."""

from collections.abc import Sequence

from torch import Tensor

from steer.flow import FlowMap
from steer.path import Time
from steer.ranges import finite

__all__ = ["ClassifierFree"]


class ClassifierFree(FlowMap):
    """`u + scale (c - u)` of velocities and of jumps, theory (50) (Ho, Salimans 2022, 2207.12598).

    c is the flow given the prompt, u the flow given the negative prompt. Every call costs two. The
    mixed jumps are not the flow map of the mixed velocity, nor do they compose: with a scale other
    than 1, what is said of exact weights no longer holds, except relative to the mixed jumps' own
    law. A map that was distilled with guidance, as the embedded one was, costs one and composes;
    re-noising keeps its marginals where the flow's velocity is that of its path, as a guided one
    in general is not (arXiv 2408.09000), else the law is the chain's own.

    Args:
        flow: a flow that takes prompts.
        scale: 1 is the prompt's own flow, 0 the negative one's; above 1 leads away from it.
        negative: the negative prompt; empty for none.

    Raises:
        ValueError: the flow takes no prompts, or the scale is no finite number.
    """

    evaluations = 2

    def __init__(self, flow: FlowMap, scale: float, negative: str = "") -> None:
        super().__init__()
        self.plain = flow.given([negative])
        if self.plain is flow:
            raise ValueError(
                f"{type(flow).__name__} takes no prompts, so there is nothing to mix: leave cfg "
                "and the negative prompt out"
            )
        self.flow, self.scale, self.negative = flow, finite("scale", scale), negative
        self.path, self.event_shape = flow.path, flow.event_shape
        self.evaluations = 2 * flow.evaluations

    def _mix(self, c: Tensor, u: Tensor) -> Tensor:
        return u + self.scale * (c - u)

    def velocity(self, x: Tensor, t: Time) -> Tensor:
        """Return the mixed velocity."""
        return self._mix(self.flow.velocity(x, t), self.plain.velocity(x, t))

    def jump(self, x: Tensor, s: Time, t: Time) -> Tensor:
        """Return the mixed jump."""
        return self._mix(self.flow.jump(x, s, t), self.plain.jump(x, s, t))

    def given(self, prompts: Sequence[str]) -> "ClassifierFree":
        """Bind prompts; the negative one stays."""
        bound = ClassifierFree(self.flow, self.scale, self.negative)
        bound.flow = self.flow.given(prompts)
        return bound

    def decode(self, x: Tensor) -> Tensor:
        """Return the flow's images."""
        return self.flow.decode(x)

    def encode(self, images: Tensor) -> Tensor:
        """Return what decodes to the images."""
        return self.flow.encode(images)
