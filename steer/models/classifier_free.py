"""Classifier-free guidance that is mixed at run time."""

from typing import Self

from torch import Tensor

from steer.flow import FlowMap, Wrapped
from steer.path import Time
from steer.ranges import finite

__all__ = ["ClassifierFree"]


class ClassifierFree(Wrapped):
    """`u + scale (c - u)` of velocities and of jumps, theory (50) (Ho, Salimans 2022, 2207.12598).

    c is the flow given the prompt, u the flow given the negative prompt. Every call costs two
    network calls. The mixed jumps are not the flow map of the mixed velocity, and they do not
    compose: with a scale other than 1, exact weights are exact only for the law of the mixed
    jumps. A map that was distilled with guidance, such as the embedded one, costs one call and
    composes. Re-noising keeps its marginals only if the flow's velocity is that of its path, which
    is in general not true for a guided velocity (arXiv 2408.09000).

    Args:
        flow: a flow that takes prompts.
        scale: 1 is the flow of the prompt, 0 that of the negative prompt; values above 1
            extrapolate.
        negative: the negative prompt; empty for none.

    Raises:
        ValueError: the flow takes no prompts, or the scale is not finite.
    """

    def __init__(self, flow: FlowMap, scale: float, negative: str = "") -> None:
        super().__init__(flow)
        self.plain = flow.given([negative])
        if self.plain is flow:
            raise ValueError(
                f"{type(flow).__name__} takes no prompts, so there is nothing to mix: leave cfg "
                "and the negative prompt out"
            )
        self.scale, self.negative = finite("scale", scale), negative
        self.evaluations = 2 * flow.evaluations

    def around(self, flow: FlowMap) -> Self:
        """Return the mixture of another flow with the same negative flow, at twice its cost."""
        view = super().around(flow)
        if view is not self:
            view.evaluations = 2 * flow.evaluations
        return view

    def calls(self, name: str, *times: Time) -> int:
        """Return the number of network evaluations of both flows' calls."""
        return self.flow.calls(name, *times) + self.plain.calls(name, *times)

    def reuses(self, s: Time, t: Time) -> bool:
        """Return whether both flows do: their steps are mixed as their predictions are."""
        return self.flow.reuses(s, t) and self.plain.reuses(s, t)

    def call(self, name: str, x: Tensor, *times: Time) -> Tensor:
        """Return the mixed velocity or jump."""
        c, u = (getattr(flow, name)(x, *times) for flow in (self.flow, self.plain))
        return u + self.scale * (c - u)

    def derives(self, name: str) -> bool:
        """Return True: denoiser and score are those of the mixed velocity."""
        return True

    def log_prob(self, x: Tensor, t: Time = 1.0) -> None:
        """Return None: a mixed field has no known density."""
        return None
