"""Contracts that flows should satisfy: inherit the one for your kind of flow in your tests.

    from steer.testing import FlowMapContract  # or OneJumpContract, VelocityContract

    class TestMine(FlowMapContract):
        def create_flow(self):
            return Mine()

`FlowMap.kind` says which: "two-time" maps keep composition and the Lagrangian rule, "one-jump"
students lead through their one-call picture, the jumps of a "velocity" integrate it.
"""

import torch
from torch import Tensor, nn

from steer.flow import FlowMap
from steer.noise import generator, noise_dtype
from steer.onto import row_times
from steer.path import Time, as_time, like

__all__ = ["Corrected", "FlowMapContract", "OneJumpContract", "VelocityContract"]


class _Contract:
    """The contract of all kinds of flows; each test uses `n` rows."""

    n = 6
    tolerance = 1e-5
    """Tolerance between equivalent calls (batches, kinds of times)."""

    def create_flow(self) -> FlowMap:
        """Return the flow under test."""
        raise NotImplementedError("abstract: return your flow map")

    def points(self, flow: FlowMap, t: float) -> Tensor:
        """Return n points at time t, (n, *event), in the flow's precision: noise carried to t."""
        source, dtype = torch.Generator().manual_seed(0), noise_dtype(flow)
        x = torch.randn(self.n, *flow.event_shape, generator=source, dtype=dtype)
        with torch.no_grad():
            return flow.jump(x, 0.0, t) if t > 0 else x

    @staticmethod
    def error(a: Tensor, b: Tensor) -> float:
        """Return how far a is from b, relative to b."""
        return float((a - b).norm() / (1e-12 + b.norm()))

    @staticmethod
    def at_most(what: str, error: float, bound: float) -> None:
        """Fail with the measured error where it exceeds the bound."""
        assert error <= bound, f"{what}: relative error {error:.3g}, at most {bound:g} expected"

    def test_shapes(self) -> None:
        """Velocity, jump, lookahead, denoiser and score are shaped as x, and finite."""
        flow = self.create_flow()
        x = self.points(flow, 0.5)
        found = {
            "velocity": flow.velocity(x, 0.5),
            "jump": flow.jump(x, 0.5, 0.75),
            "lookahead": flow.lookahead(x, 0.5),
            "denoise": flow.denoise(x, 0.5),
            "score": flow.score(x, 0.5),
        }
        for name, y in found.items():
            assert y.shape == x.shape, f"{name} is {tuple(y.shape)}, x is {tuple(x.shape)}"
            bad = int((~torch.isfinite(y)).sum())
            assert not bad, f"{name} has {bad} of {y.numel()} values that are not finite"
        decoded = len(flow.decode(x))
        assert decoded == self.n, f"decode gives {decoded} pictures for {self.n} rows"

    def test_identity(self) -> None:
        """`X(t,t,x) = x`."""
        flow = self.create_flow()
        for t in (0.0, 0.4, 1.0):
            x = self.points(flow, t)
            moved = float((flow.jump(x, t, t) - x).abs().max())
            assert moved == 0, f"X({t},{t},x) moves x by up to {moved:.3g}: it must not change x"

    def test_lookahead_is_the_jump_to_one(self) -> None:
        """`lookahead(x, t) = jump(x, t, 1)`."""
        flow = self.create_flow()
        x = self.points(flow, 0.3)
        assert torch.equal(flow.lookahead(x, 0.3), flow.jump(x, 0.3, 1.0))

    def test_denoiser_and_score_follow_from_the_velocity(self) -> None:
        """`alpha' x_0 + beta' x_1` and `alpha x_0 + beta x_1`, solved for the expected x_1."""
        flow, t = self.create_flow(), 0.6
        x = self.points(flow, t)
        alpha, beta = (float(c) for c in flow.path(t))
        d = flow.denoise(x, t)
        noise = (x - beta * d) / alpha
        slope = flow.path.slope(noise, d, t)
        self.at_most("velocity from the denoiser", self.error(slope, flow.velocity(x, t)), 1e-3)
        score = self.error(-noise / alpha, flow.score(x, t))
        self.at_most("score from the denoiser", score, 1e-3)

    def test_what_is_reused_is_the_jump(self) -> None:
        """Where `reuses(s, t)`, jump and lookahead follow from the denoiser at (x, s)."""
        flow = self.create_flow()
        for s, t in ((0.25, 0.5), (0.5, 0.53), (0.5, 1.0)):
            if not flow.reuses(s, t):
                continue
            x = self.points(flow, s)
            stepped = flow.path.carried(x, flow.denoise(x, s), s, t)
            self.at_most(
                f"jump from {s} to {t} by the denoiser, which reuses() promises",
                self.error(stepped, flow.jump(x, s, t)), 10 * self.tolerance,
            )  # fmt: skip

    def test_kinds_of_times(self) -> None:
        """A float, a scalar tensor and one time per row give the same result."""
        flow = self.create_flow()
        x = self.points(flow, 0.25)
        rows = torch.full((self.n,), 0.25, dtype=x.dtype)
        for t in (torch.tensor(0.25), rows):
            error = self.error(flow.velocity(x, t), flow.velocity(x, 0.25))
            self.at_most(f"velocity at a time of shape {tuple(t.shape)}", error, self.tolerance)
            error = self.error(flow.jump(x, t, 0.75), flow.jump(x, 0.25, 0.75))
            self.at_most(f"jump from a time of shape {tuple(t.shape)}", error, 10 * self.tolerance)

    def test_rows_do_not_see_each_other(self) -> None:
        """A row's result does not depend on its batch."""
        flow = self.create_flow()
        x = self.points(flow, 0.5)
        whole = flow.jump(x, 0.5, 1.0)
        alone = torch.cat([flow.jump(row, 0.5, 1.0) for row in x.split(1)])
        self.at_most("rows alone", self.error(alone, whole), self.tolerance)

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
        assert abs(slope - along) <= 1e-2 * abs(slope) + 1e-4, (
            f"the gradient is {along:.5g} along a direction in which the lookahead changes by "
            f"{slope:.5g}"
        )


class FlowMapContract(_Contract):
    """A map between any two times; loosen a tolerance for a learned one."""

    composition = 1e-4
    """Largest relative error of X(u,t) ∘ X(s,u) against X(s,t)."""
    lagrangian = 1e-2
    """Largest relative error of ∂_t X(s,t,x) against b_t(X(s,t,x))."""

    def test_composition(self) -> None:
        """`X(u,t) ∘ X(s,u) = X(s,t)`, relative to the displacement."""
        flow = self.create_flow()
        for s, u, t in [(0.0, 0.5, 1.0), (0.2, 0.3, 0.9)]:
            x = self.points(flow, s)
            straight = flow.jump(x, s, t)
            composed = flow.jump(flow.jump(x, s, u), u, t)
            error = self.error(composed - x, straight - x)
            self.at_most(f"X({u},{t}) after X({s},{u})", error, self.composition)

    def test_lagrangian(self) -> None:
        """`∂_t X(s,t,x) = b_t(X(s,t,x))`, on the diagonal too, by a central difference."""
        flow, h = self.create_flow(), 1e-2
        for s, t in [(0.0, 0.5), (0.3, 0.3 + h), (0.2, 0.8)]:
            x = self.points(flow, s)
            slope = (flow.jump(x, s, t + h) - flow.jump(x, s, t - h)) / (2 * h)
            error = self.error(slope, flow.velocity(flow.jump(x, s, t), t))
            self.at_most(f"the slope of X({s},t,x) at t = {t:g}", error, self.lagrangian)


class OneJumpContract(_Contract):
    """A student whose jumps all lead through its one-call picture `D = X(s,1,x)`."""

    straight = 1e-4
    """Largest relative error of X(s,t,x) against `(alpha_t / alpha_s) (x - beta_s D) + beta_t D`.
    """

    def test_jumps_lead_through_the_picture(self) -> None:
        """`X(s,t,x)` keeps the noise that x and its picture imply."""
        flow = self.create_flow()
        for s, t in [(0.0, 0.5), (0.3, 0.8)]:
            x = self.points(flow, s)
            d, (alpha, beta) = flow.lookahead(x, s), (float(c) for c in flow.path(s))
            expected = flow.path.interpolate((x - beta * d) / alpha, d, t)
            error = self.error(flow.jump(x, s, t) - x, expected - x)
            self.at_most(f"X({s},{t},x) through the picture", error, self.straight)


class VelocityContract(_Contract):
    """A velocity whose jumps integrate it in steps."""

    first_order = 5e-2
    """Largest relative error of a short jump against `x + h b_s(x)`."""
    composition = 0.2
    """Largest relative error of a long jump against many short ones."""

    def test_short_jumps_follow_the_velocity(self) -> None:
        """`X(s,s+h,x) = x + h b_s(x)` for small h."""
        flow, h = self.create_flow(), 1e-2
        for s in (0.2, 0.5, 0.8):
            x = self.points(flow, s)
            error = self.error((flow.jump(x, s, s + h) - x) / h, flow.velocity(x, s))
            self.at_most(f"X({s},{s + h:g},x) against the velocity", error, self.first_order)

    def test_long_jumps_are_many_short_ones(self) -> None:
        """`X(0,1,x)` against 32 jumps, relative to the displacement."""
        flow = self.create_flow()
        x = start = self.points(flow, 0.0)
        for k in range(32):
            x = flow.jump(x, k / 32, (k + 1) / 32)
        error = self.error(flow.lookahead(start, 0.0) - start, x - start)
        self.at_most("X(0,1,x) against 32 jumps", error, self.composition)


class Corrected(FlowMap):
    """A closed-form flow and a network's correction: `v = v_b(x,s,t) + network([x, s, t])`.

    A tiny model whose base is exact while the network's last layer is zero, as it is initially:
    for proofs about training. Time features are s, t and t - s as they are.

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
        s, t = row_times(s, x, x.dtype), row_times(t, x, x.dtype)
        return self.network(torch.cat([x, torch.stack([s, t, t - s], 1)], 1))

    def velocity(self, x: Tensor, t: Time) -> Tensor:
        """Return `b_t(x)`, corrected."""
        return self.base.velocity(x, t) + self._correction(x, t, t)

    def jump(self, x: Tensor, s: Time, t: Time) -> Tensor:
        """Return `X(s,t,x)`, corrected: exactly x where s = t."""
        gap = as_time(t).to(x) - as_time(s).to(x)
        return self.base.jump(x, s, t) + like(gap, x) * self._correction(x, s, t)
