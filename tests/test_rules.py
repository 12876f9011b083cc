"""The training rules against the closed form of a Gaussian, whose map is linear."""

import pytest
import torch

from steer.flow import FlowMap
from steer.models.two_time import NetworkFlow, TwoTimeUNet
from steer.objectives.regression import lagrangian_loss, velocity_loss
from steer.path import Linear, as_time, like
from steer.training.metric import (
    composition_error,
    lagrangian_residual,
    nearest_distance,
    retrieval_rate,
)
from steer.training.rules import (
    FlowMatching,
    MapObjective,
    build,
    draw_pair,
    draw_time,
    guided_velocity,
)


class Gaussian(FlowMap):
    """Data N(m, c²): X(s,t,x) = t m + (x - s m) sd_t / sd_s, sd_t² = (1-t)² + t² c²."""

    def __init__(self, m=0.7, c=0.4, error=0.0):
        super().__init__()
        self.path, self.event_shape = Linear(), (3,)
        self.m, self.c, self.error = m, c, error

    def _sd(self, t):
        return ((1 - t) ** 2 + t**2 * self.c**2).sqrt()

    def velocity(self, x, t):
        t = as_time(t)
        rate = (self.c**2 * t - (1 - t)) / self._sd(t) ** 2
        return self.m + like(rate, x) * (x - like(t, x) * self.m)

    def jump(self, x, s, t):
        s, t = as_time(s), as_time(t)
        scale = self._sd(t) / self._sd(s) * (1 + self.error * (t - s))
        return like(t, x) * self.m + like(scale, x) * (x - like(s, x) * self.m)


@pytest.fixture
def draw():
    generator = torch.Generator().manual_seed(0)
    n = 4096
    x_0 = torch.randn(n, 3, generator=generator).double()
    x_1 = 0.7 + 0.4 * torch.randn(n, 3, generator=generator).double()
    pair = tuple(u.double() for u in draw_pair(n, generator))
    return x_0, x_1, pair


def _loss(flow, h, draw):
    x_0, x_1, (s, t) = draw
    x = like(1 - s, x_0) * x_0 + like(s, x_0) * x_1
    step = torch.full_like(s, h)
    return lagrangian_loss(flow, flow, Gaussian().velocity, x, (s, t), step)


def test_the_lagrangian_loss_vanishes_at_the_true_map_only(draw):
    true, wrong = (_loss(Gaussian(error=e), 0.05, draw).mean() for e in (0.0, 0.2))
    assert true < 1e-4
    assert wrong > 20 * true


def test_the_error_at_the_true_map_falls_with_the_step_as_heun(draw):
    x_0, x_1, _ = draw
    s, t = torch.full((len(x_0),), 0.1).double(), torch.full((len(x_0),), 0.8).double()
    coarse, fine = (_loss(Gaussian(), h, (x_0, x_1, (s, t))).mean() for h in (0.08, 0.04))
    assert torch.log2(coarse / fine) == pytest.approx(6, abs=1)  # local error h³, squared


def test_the_map_learns_from_the_rule(draw):
    flow, target = Gaussian(error=0.2), Gaussian(error=0.2)
    flow.error = torch.nn.Parameter(torch.tensor(0.2).double())
    optimizer = torch.optim.Adam([flow.error], lr=0.01)
    for _ in range(60):
        target.error = flow.error.detach()
        optimizer.zero_grad()
        _loss_to(flow, target, draw).backward()
        optimizer.step()
    assert abs(float(flow.error.detach())) < 0.02


def _loss_to(flow, target, draw):
    x_0, x_1, (s, t) = draw
    x = like(1 - s, x_0) * x_0 + like(s, x_0) * x_1
    h = torch.full_like(s, 0.05)
    return lagrangian_loss(flow, target, Gaussian().velocity, x, (s, t), h).mean()


def test_no_gradient_reaches_the_target(draw):
    flow, target = Gaussian(), Gaussian(error=0.1)
    target.error = torch.nn.Parameter(torch.tensor(0.1).double())
    flow.error = torch.nn.Parameter(torch.tensor(0.1).double())
    _loss_to(flow, target, draw).backward()
    assert target.error.grad is None
    assert flow.error.grad is not None


def test_flow_matching_is_smallest_at_the_true_velocity(draw):
    x_0, x_1, _ = draw
    t = draw_time(len(x_0), torch.Generator().manual_seed(3)).double()
    losses = [velocity_loss(Gaussian(m), x_0, x_1, t).mean() for m in (0.6, 0.7, 0.8)]
    assert losses[1] < min(losses[0], losses[2])


def test_times_are_drawn_where_they_are_meant_to_be():
    generator = torch.Generator().manual_seed(0)
    s, t = draw_pair(20_000, generator, 0.25)
    assert (s < t).all()
    assert float((t == 1).float().mean()) == pytest.approx(0.25, abs=0.02)
    assert float((s == 0).float().mean()) == pytest.approx(0.25, abs=0.02)
    tau = draw_time(20_000, generator)
    assert tau.min() >= 0
    assert tau.max() <= 1
    assert tau.median() < 0.5


@pytest.fixture
def network():
    torch.manual_seed(0)
    net = TwoTimeUNet(["apple", "fox"], (8, 8), (1, 1), size=8, width=16, groups=4)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    return NetworkFlow(net)


def test_guidance_mixes_and_leaves_the_empty_prompt_alone(network):
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([0.3, 0.6])
    v = guided_velocity(network, ["apple", ""], 3.0)(x, t)
    c = network.given(["apple"]).velocity(x[:1], t[:1])
    u = network.velocity(x, t)
    torch.testing.assert_close(v[:1], u[:1] + 3 * (c - u[:1]), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(v[1:], u[1:], atol=1e-5, rtol=1e-4)


def test_objectives_are_functions_of_their_generator_and_train_only_the_flow(network):
    x_1, prompts = torch.rand(4, 3, 8, 8), ["apple", "fox", "", "apple fox"]
    teacher = NetworkFlow(TwoTimeUNet(**network.network.config))
    for objective in (FlowMatching(), MapObjective(build("heun"), teacher, 2.0)):
        losses = [
            objective(network, teacher, x_1, prompts, torch.Generator().manual_seed(seed))["loss"]
            for seed in (5, 5, 6)
        ]
        assert losses[0] == losses[1] != losses[2]
        network.zero_grad()
        losses[0].backward()
        assert all(p.grad is None for p in teacher.parameters())
        assert any(p.grad.abs().sum() > 0 for p in network.parameters() if p.grad is not None)


def test_the_metrics_of_a_map_are_zero_at_the_true_map_and_see_a_wrong_one(draw):
    x = draw[0][:500]
    assert composition_error(Gaussian(), x, 0.0, 0.4, 1.0) < 1e-6
    assert composition_error(Gaussian(error=0.2), x, 0.0, 0.4, 1.0) > 1e-3
    for t in (0.1, 0.5, 1.0):
        assert lagrangian_residual(Gaussian(), x, 0.0, t) < 0.02  # one-sided at t = 1
        assert lagrangian_residual(Gaussian(error=0.2), x, 0.0, t) > 0.05


class Cubic(FlowMap):
    """`X(s,t,x) = x + t³ - s³`, whose central difference over ±h is off by h²."""

    path, event_shape = Linear(), (2,)

    def velocity(self, x, t):
        return torch.full_like(x, 3 * float(t) ** 2)

    def jump(self, x, s, t):
        return x + float(t) ** 3 - float(s) ** 3


def test_the_residual_is_that_of_a_central_difference():
    x, h = torch.zeros(4, 2).double(), 0.1
    found = lagrangian_residual(Cubic(), x, 0.2, 0.5, h)
    assert found == pytest.approx(h**2 / (3 * 0.5**2), rel=1e-4)
    at_the_end = lagrangian_residual(Cubic(), x, 0.2, 1.0, h)
    assert at_the_end == pytest.approx((3 * h - h**2) / 3, rel=1e-4)
    at_the_start = lagrangian_residual(Cubic(), x, 0.5, 0.5, h)
    assert at_the_start == pytest.approx((3 * 0.5 * h + h**2) / (3 * 0.5**2), rel=1e-4)


def test_distances_and_retrieval_are_what_their_names_say():
    x = torch.tensor([[0.0, 0.0], [1.0, 1.0], [5.0, 5.0]])
    torch.testing.assert_close(nearest_distance(x[:1], x[1:]), torch.tensor([1.0]))
    expected = torch.tensor([1.0, 1.0, 4.0])
    torch.testing.assert_close(nearest_distance(x, x, exclude_self=True), expected)
    scores = torch.tensor([[2.0, 1.0], [2.0, 1.0]])
    rate, error = retrieval_rate(lambda images, captions: scores, x[:2], ["a", "b"])
    assert rate == 0.5
    assert error == pytest.approx((0.25 / 2) ** 0.5)
