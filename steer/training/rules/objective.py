"""The loss of a step of map training: flow matching on the diagonal, a rule off it."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn

from steer.flow import FlowMap, device_of
from steer.names import unknown
from steer.objectives.regression import Velocity
from steer.path import like
from steer.training.rules.along import How, differentiable_forward
from steer.training.rules.base import Look, Rule
from steer.training.rules.matching import guided_velocity
from steer.training.rules.times import Pairs, draw_time, pairs_named
from steer.training.rules.weights import DISTANCES, weight_named

__all__ = ["MapObjective"]


class MapObjective(nn.Module):
    """A rule of `steer.RULES` as an objective of `FlowTraining`.

    Rules with the pair's velocity use the teacher's instead, if there is one and nothing else is
    set: the two are the same in the mean only where the teacher is not guided.

    A share of the batch is on the diagonal, where `v(x,t,t)` is fitted to the velocity: a guided
    teacher's where there is one, else the pair's, `w x' + (1-w) v̄(x,t,t | "")`, which fuses
    classifier-free guidance w into the map (Geng et al. 2025, 2505.13447). The rest of the batch
    has pairs s < t, for the rule.

    Args:
        rule: see `steer.training.rules.table.build`.
        teacher: the velocity, whose parameters require no gradient; needed by rules that follow
            it.
        guidance: scale w of classifier-free guidance that the map learns; 1 for none. Two numbers:
            w is sampled between them for each row, and is an input of the map (`flow.guided`).
        pairs: the law of (s, t), by name or as a function. Default: the rule's own.
        weight: "uniform", "adaptive" or "learned". Default: the rule's own.
        distance: "square", or "huber" for rules whose targets all come from a teacher.
        diagonal: share of the batch on the diagonal. Default: the rule's own.
        derivative: "jvp", "difference", or "auto": the first where the network can do it.

    Raises:
        ValueError: a rule that follows a teacher without one, an unknown name, a share out of
            range.
    """

    def __init__(
        self,
        rule: Rule,
        teacher: FlowMap | None = None,
        guidance: float | tuple[float, float] = 1.0,
        *,
        pairs: str | Pairs | None = None,
        weight: str | None = None,
        diagonal: float | None = None,
        distance: str = "square",
        derivative: How = "auto",
    ) -> None:
        super().__init__()
        if teacher is not None and rule.field == "conditional" and not rule.chosen:
            rule = copy.copy(rule)  # the caller may use it again, without a teacher
            rule.field = "teacher"
        rule.led_by(teacher)
        share = rule.diagonal if diagonal is None else diagonal
        if not 0 < share < 1:
            raise ValueError(f"diagonal is a fraction of the batch between 0 and 1, got {share}")
        if distance not in DISTANCES:
            raise unknown("distance", distance, DISTANCES)
        if distance != "square" and (teacher is None or rule.field == "conditional"):
            raise ValueError(
                f"distance={distance!r} with a pair's velocity finds its median, and the map is "
                "its mean: give a teacher and a rule that follows it, or distance='square'"
            )
        self.rule, self.guidance, self.diagonal = rule, guidance, share
        self.distance = DISTANCES[distance]
        # not a submodule: it is frozen, and not in checkpoints
        self._teacher = [] if teacher is None else [teacher]
        self.pairs = pairs_named(rule.pairs if pairs is None else pairs)
        self.weight = weight_named(weight or rule.weight)
        if rule.differenced and derivative == "jvp":
            raise ValueError(
                f"derivative='jvp': {type(rule).__name__} takes central differences whatever the "
                "network can do: leave it out, or choose imf, which is the same rule by jvp"
            )
        self.derivative: How = "difference" if rule.differenced else derivative

    def forward(
        self,
        flow: FlowMap,
        average: FlowMap,
        x_1: Tensor,
        prompts: Sequence[str],
        generator: Generator,
        progress: float = 0.0,
    ) -> dict[str, Tensor]:
        """Return {"loss", "diagonal", "off"}: mean squares in the units of a velocity.

        Args:
            flow: trained.
            average: its running average.
            x_1: data, (n, *event).
            prompts: one a row.
            generator: generator of noise and times.
            progress: of the run, from 0 to 1.
        """
        n = len(x_1)
        if n < 2:
            raise ValueError(
                "a batch of one row cannot be on the diagonal and off it: give batch_size 2 or "
                "more"
            )
        k = min(n - 1, max(1, round(self.diagonal * n)))
        x_0 = torch.randn(x_1.shape, generator=generator).to(x_1)
        tau = draw_time(k, generator)
        s, t = self.pairs(n - k, generator)
        uniform = torch.rand(n - k, generator=generator)
        scale = self._scales(n, generator, x_1)
        start = torch.cat([tau, s]).to(x_1.device)
        tau, s, t, uniform = (u.to(x_1.device) for u in (tau, s, t, uniform))
        x = flow.path.interpolate(x_0, x_1, start)
        slope = flow.path.slope(x_0, x_1, start)
        pair = self._pair(self._at(average, scale), x, slope, start, prompts, scale)
        goal = pair[:k]
        if self._teacher:
            with torch.no_grad():
                goal = self._teacher_on(x, prompts[:k], scale[:k])(x[:k], tau)
        on = self._at(flow.given(prompts[:k]), scale[:k])
        loss = self.distance(on.velocity(x[:k], tau) - goal)
        bound, follows = self._at(flow.given(prompts[k:]), scale[k:]), None
        if self._teacher:
            follows = self._teacher_on(x, prompts[k:], scale[k:])
        if self.derivative == "auto" and self.rule.derives:
            self.derivative = differentiable_forward(bound, x[k:], s, t)

        def own(x: Tensor, t: Tensor) -> Tensor:
            with torch.no_grad():
                return bound.velocity(x, t)

        target = self._at(average.given(prompts[k:]), scale[k:])
        look = Look(
            bound, target, own, follows, x[k:], pair[k:], s, t, uniform, progress, self.derivative
        )
        off = self.distance(self.rule.error(look))
        diagonal = loss.mean()
        whole = self.weight(torch.cat([loss, off]), torch.cat([tau, s]), torch.cat([tau, t]))
        return {"loss": whole, "diagonal": diagonal.detach(), "off": off.detach().mean()}

    def _scales(self, n: int, generator: Generator, x: Tensor) -> Tensor:
        """Return a guidance scale for each row, (n,)."""
        if not isinstance(self.guidance, tuple):
            return torch.full((n,), self.guidance, device=x.device)
        low, high = self.guidance
        return (low + (high - low) * torch.rand(n, generator=generator)).to(x.device)

    def _at(self, flow: FlowMap, scale: Tensor) -> FlowMap:
        """Return the map at one guidance scale per row, if the scale is an input."""
        guided: Any = getattr(flow, "guided", None)
        return guided(scale) if isinstance(self.guidance, tuple) else flow

    def _teacher_on(self, x: Tensor, prompts: Sequence[str], scale: Tensor) -> Velocity:
        teacher = self._teacher[0]
        if device_of(teacher) != x.device:
            teacher.to(x.device)
        if self.guidance == 1:
            return teacher.given(prompts).velocity
        return guided_velocity(teacher, prompts, scale)

    @torch.no_grad()
    def _pair(
        self,
        average: FlowMap,
        x: Tensor,
        slope: Tensor,
        t: Tensor,
        prompts: Sequence[str],
        scale: Tensor,
    ) -> Tensor:
        """Return the pair's velocity; with a prompt, guided: `w x' + (1-w) v(x,t,t | "")`."""
        if self.guidance == 1 or (self._teacher and self.rule.field != "conditional"):
            return slope
        leads = self._teacher[0] if self._teacher else average  # as on the diagonal
        free = leads.given([""] * len(x)).velocity(x, t)
        told = torch.tensor([bool(p) for p in prompts], device=x.device)
        return torch.lerp(free, slope, like(torch.where(told, scale, 1.0), x))
