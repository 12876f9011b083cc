"""Training of posterior maps: from data, or from a velocity by the GLASS identity.

Meta flow maps (2026, arXiv 2601.14430) and posterior diamond maps (2602.05993). At each (x, t) the
inner flow is a flow map, on the linear path, so every rule of `steer.RULES` trains it.
"""

from collections.abc import Sequence

import torch
from torch import Generator, Tensor, nn

from steer.flow import FlowMap
from steer.objectives.regression import Velocity, mean_square
from steer.path import Linear, Path, Time
from steer.posterior import PosteriorMap, glass_velocity
from steer.ranges import within
from steer.training.rules.along import How
from steer.training.rules.base import Look, Rule
from steer.training.rules.semigroup import PSD
from steer.training.rules.times import Pairs, pairs_named

__all__ = ["PosteriorFlow", "PosteriorObjective"]

LEAST = 0.1
"""Lower bound of the posterior standard deviation c in a row's weight: that at t = .91, linear."""


class PosteriorFlow(FlowMap):
    """The inner flow of a posterior map at fixed (x, t), from N(0, I) to `p(x_1 | x_t = x)`.

    It can be used like any flow map: by rules, metrics and samplers. Its x and its times are the
    inner state and the inner times. Prompts are bound to the map, not to this flow.

    Args:
        posterior: the map.
        x: states at t, (n, *event): row i of a call belongs to row i of x.
        t: a float or a tensor () or (n,).
    """

    def __init__(self, posterior: PosteriorMap, x: Tensor, t: Time) -> None:
        super().__init__()
        self.posterior, self.x, self.t = posterior, x, t
        self.path, self.event_shape = Linear(), tuple(x.shape[1:])

    def mean_velocity(self, x: Tensor, s: Time, t: Time) -> Tensor:
        """Return v of inner states from inner time s to t, (n, *event)."""
        return self.posterior.mean_velocity(x, s, t, self.x, self.t)

    def velocity(self, x: Tensor, t: Time) -> Tensor:
        """Return the inner velocity, (n, *event)."""
        return self.mean_velocity(x, t, t)

    def jump(self, x: Tensor, s: Time, t: Time) -> Tensor:
        """Return the inner jump, (n, *event)."""
        return self.posterior.jump(x, s, t, self.x, self.t)


class PosteriorObjective(nn.Module):
    """The loss of a step of posterior map training: flow matching, and a rule off the diagonal.

    From data x_1, noise x_0 and z, an outer time t and inner times r <= s:

        x_t = α_t x_0 + β_t x_1,   u = (1-r) z + r x_1
        on the diagonal, r = s:  |v(u, r, r, x_t, t) - b|²,   b = x_1 - z
        off it, r < s:           |e|², e the rule's error at u for the inner flow at (x_t, t)

    The mean of `x_1 - z` given u and x_t is the inner flow's velocity, so that is the diagonal's
    minimum. With a teacher, b is the teacher's inner velocity instead, `glass_velocity`: this
    removes the variance of the pair, and x_1 only determines the points. The weight of a row is
    `((1-r)² + r² c²) / c²`, `c² = α² / (α² + β²)`: for N(0, I) data this is the inverse variance
    of `x_1 - z` given u and x_t, so that the noise at one time does not dominate the others. t is
    uniform, and 0, where the posterior is all of p, for a share of the rows.

    Args:
        path: of the outer flow; the teacher's, where there is one.
        teacher: a frozen flow whose posterior is meant; None: that of the data.
        rule: off the diagonal, see `steer.training.rules.table.build`; it may follow the network's
            own velocity or the teacher. Default: `PSD` at the midpoint, of its own.
        pairs: the law of (r, s), by name or as a function. Default: the rule's own.
        diagonal: share of the batch on the diagonal. Default: the rule's own.
        prior: share of the rows with t = 0.
        derivative: "jvp" or "difference", for rules that take one.

    Raises:
        ValueError: a rule that follows a teacher without one, an unknown name, a share out of
            range.
    """

    def __init__(
        self,
        path: Path,
        teacher: FlowMap | None = None,
        rule: Rule | None = None,
        *,
        pairs: str | Pairs | None = None,
        diagonal: float | None = None,
        prior: float = 0.1,
        derivative: How = "jvp",
    ) -> None:
        super().__init__()
        self.path, self.rule = path, PSD() if rule is None else rule
        self.rule.led_by(teacher)
        # not a submodule: it is frozen, and not in checkpoints
        self._teacher = [] if teacher is None else [teacher.eval().requires_grad_(False)]
        self.pairs = pairs_named(self.rule.pairs if pairs is None else pairs)
        share = self.rule.diagonal if diagonal is None else diagonal
        self.diagonal = within("diagonal", share, 0, 1)
        self.prior, self.derivative = within("prior", prior, 0, 1), derivative

    def forward(
        self,
        flow: PosteriorMap,
        average: PosteriorMap,
        x_1: Tensor,
        prompts: Sequence[str],
        generator: Generator,
        progress: float = 0.0,
    ) -> dict[str, Tensor]:
        """Return {"loss", "diagonal", "off"}; the last two are mean squares, not weighted.

        Args:
            flow: trained.
            average: its running average: the target of rules that have one.
            x_1: data, (n, *event), at least two rows.
            prompts: one a row; none for a map that takes none.
            generator: generator of noise and times.
            progress: of the run, from 0 to 1.

        Raises:
            ValueError: a single row.
        """
        n, kind = len(x_1), torch.promote_types(x_1.dtype, torch.float32)
        if n < 2:
            raise ValueError(f"{n} rows: a step needs one on the diagonal and one off it")
        k = min(n - 1, max(1, round(self.diagonal * n)))
        x_0, z = torch.randn((2, *x_1.shape), generator=generator).to(x_1)
        t, prior, split = torch.rand((3, n), generator=generator)
        tau = torch.rand(k, generator=generator)
        start, s = self.pairs(n - k, generator)
        t, r = torch.where(prior < self.prior, 0.0, t), torch.cat([tau, start])
        t, r, s, split = (c.to(x_1.device, kind) for c in (t, r, s, split))
        x, linear = self.path.interpolate(x_0, x_1, t), Linear()
        u, pair = linear.interpolate(z, x_1, r), linear.slope(z, x_1, r)
        on, off = slice(k), slice(k, n)

        def bound(posterior: PosteriorMap, rows: slice) -> PosteriorFlow:
            return PosteriorFlow(posterior.given(prompts[rows]), x[rows], t[rows])

        def exact(rows: slice) -> Velocity | None:
            if not self._teacher:
                return None
            teacher = self._teacher[0].to(x.device).given(prompts[rows])
            return lambda u, r: glass_velocity(teacher, u, r, x[rows], t[rows])

        def own(u: Tensor, r: Tensor) -> Tensor:
            with torch.no_grad():
                return inner.velocity(u, r)

        goal, diagonal, inner = pair[on], exact(on), bound(flow, off)
        if diagonal is not None:
            with torch.no_grad():
                goal = diagonal(u[on], r[on])
        fit = mean_square(bound(flow, on).velocity(u[on], r[on]) - goal)
        ahead = Look(
            flow=inner, target=bound(average, off), own=own, teacher=exact(off), x=u[off],
            pair=pair[off], s=r[off], t=s, uniform=split[off], progress=progress,
            how=self.derivative,
        )  # fmt: skip
        error = mean_square(self.rule.error(ahead))
        alpha, beta = self.path(t)
        c2 = (alpha**2 / (alpha**2 + beta**2)).clamp(min=LEAST**2)
        loss = (torch.cat([fit, error]) * ((1 - r) ** 2 + r**2 * c2) / c2).mean()
        return {"loss": loss, "diagonal": fit.detach().mean(), "off": error.detach().mean()}
