"""A contract that every flow map should keep: inherit it in your tests.

from steer.testing import FlowMapContract

    class TestMine(FlowMapContract):
        def create_flow(self):
            return Mine()
"""

import torch
from torch import Tensor, nn

from steer.flow import FlowMap
from steer.noise import generator
from steer.path import Time, as_time, like

__all__ = ["Corrected", "FlowMapContract"]


class FlowMapContract:
    """The tests: subclass, and give `create_flow`; loosen a tolerance for a learned map."""

    n = 6
    composition = 1e-4
    """Largest relative error of X(u,t) ∘ X(s,u) against X(s,t)."""
    lagrangian = 1e-2
    """Largest relative error of ∂_t X(s,t,x) against b_t(X(s,t,x))."""
    tolerance = 1e-5
    """How far results may differ between ways to say the same (batches, kinds of times)."""

    def create_flow(self) -> FlowMap:
        """Return the flow under test."""
        raise NotImplementedError("abstract: return your flow map")

    def points(self, flow: FlowMap, t: float) -> Tensor:
        """Return n points at time t, (n, *event): noise, carried there by the map."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(self.n, *flow.event_shape, generator=generator)
        with torch.no_grad():
            return flow.jump(x, 0.0, t) if t > 0 else x

    @staticmethod
    def _error(a: Tensor, b: Tensor) -> float:
        return float((a - b).norm() / (1e-12 + b.norm()))

    def test_shapes(self) -> None:
        """Velocity, jump, lookahead, denoiser and score are shaped as x."""
        flow = self.create_flow()
        x = self.points(flow, 0.5)
        assert x.shape == (self.n, *flow.event_shape)
        for y in (
            flow.velocity(x, 0.5),
            flow.jump(x, 0.5, 0.75),
            flow.lookahead(x, 0.5),
            flow.denoise(x, 0.5),
            flow.score(x, 0.5),
        ):
            assert y.shape == x.shape
            assert torch.isfinite(y).all()
        assert len(flow.decode(x)) == self.n

    def test_identity(self) -> None:
        """`X(t,t,x) = x`."""
        flow = self.create_flow()
        for t in (0.0, 0.4, 1.0):
            x = self.points(flow, t)
            assert torch.equal(flow.jump(x, t, t), x)

    def test_lookahead_is_the_jump_to_one(self) -> None:
        """`lookahead(x, t) = jump(x, t, 1)`."""
        flow = self.create_flow()
        x = self.points(flow, 0.3)
        assert torch.equal(flow.lookahead(x, 0.3), flow.jump(x, 0.3, 1.0))

    def test_composition(self) -> None:
        """`X(u,t) ∘ X(s,u) = X(s,t)`, relative to the displacement."""
        flow = self.create_flow()
        for s, u, t in [(0.0, 0.5, 1.0), (0.2, 0.3, 0.9)]:
            x = self.points(flow, s)
            straight = flow.jump(x, s, t)
            composed = flow.jump(flow.jump(x, s, u), u, t)
            assert self._error(composed - x, straight - x) <= self.composition

    def test_lagrangian(self) -> None:
        """`∂_t X(s,t,x) = b_t(X(s,t,x))`, on the diagonal too, by a central difference."""
        flow, h = self.create_flow(), 1e-2
        for s, t in [(0.0, 0.5), (0.3, 0.3 + h), (0.2, 0.8)]:
            x = self.points(flow, s)
            slope = (flow.jump(x, s, t + h) - flow.jump(x, s, t - h)) / (2 * h)
            assert self._error(slope, flow.velocity(flow.jump(x, s, t), t)) <= self.lagrangian

    def test_denoiser_and_score_follow_from_the_velocity(self) -> None:
        """`alpha' x_0 + beta' x_1` and `alpha x_0 + beta x_1`, solved for the expected x_1."""
        flow, t = self.create_flow(), 0.6
        x = self.points(flow, t)
        alpha, beta = (float(c) for c in flow.path(t))
        alpha_dot, beta_dot = (float(c) for c in flow.path.derivative(t))
        d = flow.denoise(x, t)
        noise = (x - beta * d) / alpha
        assert self._error(alpha_dot * noise + beta_dot * d, flow.velocity(x, t)) < 1e-3
        assert self._error(-noise / alpha, flow.score(x, t)) < 1e-3

    def test_kinds_of_times(self) -> None:
        """A float, a scalar tensor and one time a row mean the same."""
        flow = self.create_flow()
        x = self.points(flow, 0.25)
        rows = torch.full((self.n,), 0.25)
        for t in (torch.tensor(0.25), rows):
            error = self._error(flow.velocity(x, t), flow.velocity(x, 0.25))
            assert error <= self.tolerance
            error = self._error(flow.jump(x, t, 0.75), flow.jump(x, 0.25, 0.75))
            assert error <= 10 * self.tolerance

    def test_rows_do_not_see_each_other(self) -> None:
        """A row's result does not depend on its batch."""
        flow = self.create_flow()
        x = self.points(flow, 0.5)
        whole = flow.jump(x, 0.5, 1.0)
        alone = torch.cat([flow.jump(row, 0.5, 1.0) for row in x.split(1)])
        assert self._error(alone, whole) <= self.tolerance

    def test_gradient(self) -> None:
        """The lookahead's gradient is that of finite differences along a random direction."""
        flow = self.create_flow()
        x = self.points(flow, 0.4).double().requires_grad_()
        flow = flow.double()
        v = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
        (gradient,) = torch.autograd.grad(flow.lookahead(x, 0.4).square().sum(), x)
        with torch.no_grad():
            h = 1e-4
            up, down = (flow.lookahead(x + d * h * v, 0.4).square().sum() for d in (1, -1))
        slope, along = float((up - down) / (2 * h)), float((gradient * v).sum())
        assert abs(slope - along) <= 1e-2 * abs(slope) + 1e-4


class Corrected(FlowMap):
    """A closed-form flow and a network's correction: `v = v_b(x,s,t) + network([x, s, t])`.

    A tiny model whose base is exact where the network's last layer is zero, as it is at first: for
    proofs about training. Time features are s, t and t - s as they are.

    Args:
        base: a flow on vectors (d,).
        width: of the two hidden layers.
        seed: fixes the hidden layers.
    """

    name = "corrected"

    def __init__(self, base: FlowMap, width: int = 64, seed: int = 0) -> None:
        super().__init__()
        (d,) = base.event_shape
        self.base, self.path, self.event_shape = base, base.path, base.event_shape
        with torch.random.fork_rng(devices=[]):
            self.network = nn.Sequential(
                nn.Linear(d + 3, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
                nn.Linear(width, d),
            )  # fmt: skip
        source = generator(seed, "corrected")
        for p in self.network.parameters():
            p.data = torch.randn(p.shape, generator=source) * p[0].numel() ** -0.5
        for p in self.network[-1].parameters():
            p.data.zero_()

    def _correction(self, x: Tensor, s: Time, t: Time) -> Tensor:
        s, t = (as_time(u).to(x).expand(len(x)) for u in (s, t))
        return self.network(torch.cat([x, torch.stack([s, t, t - s], 1)], 1))

    def velocity(self, x: Tensor, t: Time) -> Tensor:
        """Return `b_t(x)`, corrected."""
        return self.base.velocity(x, t) + self._correction(x, t, t)

    def jump(self, x: Tensor, s: Time, t: Time) -> Tensor:
        """Return `X(s,t,x)`, corrected: exactly x where s = t."""
        gap = as_time(t).to(x) - as_time(s).to(x)
        return self.base.jump(x, s, t) + like(gap, x) * self._correction(x, s, t)
