"""Flow matching on a batch, and the guided velocity of a teacher."""

from collections.abc import Sequence

import torch
from torch import Tensor

from steer.flow import FlowMap
from steer.objectives.regression import Velocity, velocity_loss
from steer.path import like
from steer.training.rules.times import draw_time

__all__ = ["FlowMatching", "guided_velocity"]


def guided_velocity(flow: FlowMap, prompts: Sequence[str], scale: float | Tensor) -> Velocity:
    """Return `(x, t) -> u + scale (c - u)`, classifier-free guidance (Ho & Salimans, 2207.12598).

    c is the velocity given the prompts, one per row, and u that given the empty prompt. For an
    empty prompt the guided velocity equals the plain one. See theory (12).

    Args:
        flow: a flow that takes prompts.
        prompts: one per row.
        scale: a number, or one per row, (n,).
    """
    bound = flow.given([*prompts, *[""] * len(prompts)])

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        c, u = bound.velocity(torch.cat([x, x]), torch.cat([t, t])).chunk(2)
        return u + (like(scale, c) if isinstance(scale, Tensor) else scale) * (c - u)

    return velocity


class FlowMatching:
    """The objective of a velocity: its mean loss on one batch."""

    def __call__(
        self,
        flow: FlowMap,
        average: FlowMap,
        x_1: Tensor,
        prompts: Sequence[str],
        generator: torch.Generator,
        progress: float = 0.0,
    ) -> dict[str, Tensor]:
        """Return {"loss"}; noise and times are sampled with `generator`."""
        x_0 = torch.randn(x_1.shape, generator=generator).to(x_1)
        t = draw_time(len(x_1), generator).to(x_1.device)
        return {"loss": velocity_loss(flow.given(prompts), x_0, x_1, t).mean()}
