"""Training rules: a velocity, then the flow map of a frozen velocity, each on a step's batch.

The regressions themselves are in `steer.objectives.regression`; here is what a batch draws.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from steer.flow import FlowMap
from steer.objectives.regression import Velocity, lagrangian_loss, mean_square, velocity_loss

__all__ = ["FlowMatching", "MapDistillation", "draw_pair", "draw_time", "guided_velocity"]


def draw_time(n: int, generator: torch.Generator, uniform: float = 0.2) -> Tensor:
    """Draw n times: `sigmoid(N(-1/2, 1))`, and a share of `uniform` ones (n,)."""
    bell = torch.sigmoid(torch.randn(n, generator=generator) - 0.5)
    flat = torch.rand(n, generator=generator)
    return torch.where(torch.rand(n, generator=generator) < uniform, flat, bell)


def draw_pair(n: int, generator: torch.Generator, ends: float = 0.35) -> tuple[Tensor, Tensor]:
    """Draw n pairs s < t, uniform on the triangle; a share `ends` has s = 0, as many t = 1."""
    pair = torch.rand(n, 2, generator=generator).sort(1).values
    s, t = pair.unbind(1)
    s = torch.where(torch.rand(n, generator=generator) < ends, 0.0, s)
    t = torch.where(torch.rand(n, generator=generator) < ends, 1.0, t)
    return s, t


def guided_velocity(flow: FlowMap, prompts: Sequence[str], scale: float) -> Velocity:
    """Return `(x, t) -> u + scale (c - u)`, classifier-free guidance (Ho & Salimans, 2207.12598).

    c is the velocity given the prompts, one a row, and u given the empty prompt: where the prompt
    is empty, the guided velocity is the plain one. See theory (12).
    """
    bound = flow.given([*prompts, *[""] * len(prompts)])

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        c, u = bound.velocity(torch.cat([x, x]), torch.cat([t, t])).chunk(2)
        return u + scale * (c - u)

    return velocity


class FlowMatching:
    """The velocity's objective: its mean loss on one batch."""

    def __call__(
        self,
        flow: FlowMap,
        average: FlowMap,
        x_1: Tensor,
        prompts: Sequence[str],
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """Return {"loss"}; noise and times are drawn from `generator`."""
        x_0 = torch.randn(x_1.shape, generator=generator).to(x_1)
        t = draw_time(len(x_1), generator).to(x_1.device)
        return {"loss": velocity_loss(flow.given(prompts), x_0, x_1, t).mean()}


class MapDistillation:
    """The map's objective: half the batch on the diagonal, half off it.

    On the diagonal `v(x,t,t)` regresses the teacher's guided velocity, off it the map follows that
    same velocity. So the map is the map of its own velocity, and nothing is mixed at run time.

    Args:
        teacher: the frozen velocity.
        guidance: scale of classifier-free guidance, 1 for none.
        step: the Heun step h is uniform between these.
    """

    def __init__(
        self, teacher: FlowMap, guidance: float = 2.0, step: tuple[float, float] = (0.03, 0.13)
    ) -> None:
        self.teacher = teacher.eval().requires_grad_(False)
        self.guidance, self.step = guidance, step

    def __call__(
        self,
        flow: FlowMap,
        average: FlowMap,
        x_1: Tensor,
        prompts: Sequence[str],
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """Return {"loss", "diagonal", "off"}; all noise is drawn from `generator`."""
        self.teacher.to(x_1.device)  # not a part of the trained module: nobody else moves it
        n, k = len(x_1), len(x_1) // 2
        x_0 = torch.randn(x_1.shape, generator=generator).to(x_1)
        tau = draw_time(k, generator).to(x_1.device)
        s, t = (u.to(x_1.device) for u in draw_pair(n - k, generator))
        low, high = self.step
        h = (low + (high - low) * torch.rand(n - k, generator=generator)).to(x_1.device)
        x = flow.path.interpolate(x_0, x_1, torch.cat([tau, s]))
        with torch.no_grad():
            goal = guided_velocity(self.teacher, prompts[:k], self.guidance)(x[:k], tau)
        diagonal = mean_square(flow.given(prompts[:k]).velocity(x[:k], tau) - goal).mean()
        off = lagrangian_loss(
            flow.given(prompts[k:]),
            average.given(prompts[k:]),
            guided_velocity(self.teacher, prompts[k:], self.guidance),
            x[k:],
            (s, t),
            h,
        ).mean()
        return {"loss": diagonal + off, "diagonal": diagonal.detach(), "off": off.detach()}
