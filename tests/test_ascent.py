"""FMRG-J and ReNO: their rules against a slow reference, their brakes, their optimum."""

import itertools
import math

import pytest
import torch

import steer
from steer.guidance.ascent import FlowMapControl, NoiseAscent, whole_reward
from tests.test_flow import mixture

A = torch.tensor([0.6, -0.3, 0.4])
LINEAR = steer.LinearReward(A)


def start(n=6, p=None):
    shape = (n, 3) if p is None else (p, n, 3)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def curved(x):
    return torch.tanh(x).sum(1)


def gradient(flow, x, t):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(curved(flow.jump(x, t, 1.0)).sum(), x)[0]


def last(sampler, x, **options):
    *_, population = sampler.steps(x, **options)
    return population


def test_fmrg_j_is_its_rule():
    flow, x = mixture(), start()
    times = [0.0, 0.25, 0.6, 1.0]
    done = last(FlowMapControl(flow, whole_reward(flow, curved, None), times, 0.5), x)
    for s, t in itertools.pairwise(times):
        mean_velocity = (flow.jump(x, s, t) - x) / (t - s)
        g = gradient(flow, x, s)
        push = 0.5 * mean_velocity.norm(dim=1, keepdim=True) * g / g.norm(dim=1, keepdim=True)
        x = x + (t - s) * (mean_velocity + push)
    assert torch.allclose(done.x, x, atol=1e-5)
    assert torch.allclose(done.reward, curved(x), atol=1e-5)
    assert not done.log_w.any()


def test_fmrg_j_without_scaling_is_the_published_equation():
    """On N(0, σ²) and `-(x - a)²` every distance to a shrinks by `exp(-π scale σ)`."""
    flow, x = mixture(), start()
    times = [0.0, 0.25, 0.6, 1.0]
    view = whole_reward(flow, curved, None)
    done = last(FlowMapControl(flow, view, times, 0.5, relative=False), x)
    for s, t in itertools.pairwise(times):
        x = flow.jump(x, s, t) + (t - s) * 0.5 * gradient(flow, x, s)
    assert torch.allclose(done.x, x, atol=1e-5)

    flow = steer.GaussianMixture(torch.zeros(1, 1), 0.47**2)
    view = whole_reward(flow, lambda y: -(y[:, 0] - 1.5).square(), None)
    x = torch.linspace(-2, 2, 5)[:, None]
    times = torch.linspace(0, 1, 401, dtype=torch.float64).tolist()
    done = last(FlowMapControl(flow, view, times, 0.49, relative=False), x)
    shrunk = 1.5 + (flow.jump(x, 0.0, 1.0) - 1.5) * math.exp(-math.pi * 0.49 * 0.47)
    assert torch.allclose(done.x, shrunk, atol=5e-3)


def test_reno_is_its_rule():
    flow, x = mixture(), start()
    done = last(NoiseAscent(flow, whole_reward(flow, curved, None), 4, 0.2), x)
    norm, best = x.norm(dim=1, keepdim=True), x
    for k in range(3):
        rate = 0.2 * (1 + torch.cos(torch.tensor(torch.pi * k / 4))) / 2
        g = gradient(flow, x, 0.0)
        x = x + rate * norm * g / g.norm(dim=1, keepdim=True)
        x = x * norm / x.norm(dim=1, keepdim=True)
        better = curved(flow.jump(x, 0.0, 1.0)) > curved(flow.jump(best, 0.0, 1.0))
        best = torch.where(better[:, None], x, best)
    assert torch.allclose(done.x, flow.jump(best, 0.0, 1.0), atol=1e-5)
    assert done.time == 1


def test_reno_finds_the_best_direction_of_a_gaussian():
    """One Gaussian, linear reward: on the sphere the optimum is x_0 = |x_0| a / |a|."""
    flow = steer.GaussianMixture(torch.zeros(1, 3), 0.5)
    x = start(16)
    done = last(NoiseAscent(flow, whole_reward(flow, LINEAR, None), 40, 0.5), x)
    best = flow.jump(x.norm(dim=1, keepdim=True) * A / A.norm(), 0.0, 1.0)
    assert torch.allclose(done.reward, LINEAR(best), rtol=0.01)


def test_reno_keeps_the_best_on_the_way():
    flow = mixture()
    heights = [
        population.reward
        for population in NoiseAscent(flow, whole_reward(flow, curved, None), 6, 3.0).steps(
            start(64)
        )
    ]
    assert all((b >= a - 1e-5).all() for a, b in itertools.pairwise(heights))


def test_reno_moves_less_far_with_a_brake():
    flow, x = mixture(), start(64)
    before = curved(flow.jump(x, 0.0, 1.0))
    height = float(before.median())
    braked = steer.Braked(whole_reward(flow, curved, None), height)
    done = last(NoiseAscent(flow, braked, 8, 0.2), x)
    high = before >= height
    assert torch.allclose(done.reward[high], before[high], atol=1e-5)
    assert (done.reward[~high] > before[~high]).all()
    free = last(NoiseAscent(flow, whole_reward(flow, curved, None), 8, 0.2), x)
    assert done.reward.mean() < free.reward.mean()


def test_what_is_guided_and_what_is_not():
    """Unguided steps are the map's own; their reward is not looked at."""
    flow, times = mixture(), [0.0, 0.5, 1.0]
    potential = whole_reward(flow, curved, None)
    none = FlowMapControl(flow, potential, times, 0.5, guided=[])
    populations = list(none.steps(start()))
    x = flow.jump(flow.jump(start(), 0.0, 0.5), 0.5, 1.0)
    assert torch.allclose(populations[-1].x, x, atol=1e-6)
    assert populations[0].reward.isnan().all()
    late = list(FlowMapControl(flow, potential, times, 0.5, guided=[0.5]).steps(start()))
    assert torch.allclose(late[0].x, flow.jump(start(), 0.0, 0.5), atol=1e-6)
    assert torch.allclose(late[0].reward, curved(flow.jump(late[0].x, 0.5, 1.0)), atol=1e-5)


@pytest.mark.parametrize("kind", ["fmrg-j", "reno"])
def test_prompts_and_micro_batches_change_nothing(kind):
    def make(size):
        flow = mixture()
        potential = whole_reward(flow, curved, None)
        if kind == "reno":
            return NoiseAscent(flow, potential, 3, batch_size=size)
        return FlowMapControl(flow, potential, [0.0, 0.4, 1.0], batch_size=size)

    x = start(6, 2)
    whole, parts = last(make(None), x), last(make(4), x)
    assert whole.x.shape == (2, 6, 3)
    assert whole.reward.shape == whole.log_w.shape == (2, 6)
    assert whole.log_z.shape == whole.ess.shape == (2,)
    assert torch.allclose(whole.x, parts.x, atol=1e-5)
    assert torch.allclose(last(make(None), x[1]).x, whole.x[1], atol=1e-5)


def test_a_start_of_another_shape():
    flow = mixture()
    with pytest.raises(ValueError, match=r"a start of shape \(6, 2\)"):
        last(NoiseAscent(flow, whole_reward(flow, curved, None), 2), torch.zeros(6, 2))


def test_two_runs_of_one_sampler_do_not_meet():
    flow = mixture()
    sampler = FlowMapControl(flow, whole_reward(flow, curved, None), [0.0, 0.5, 1.0])
    a, b = sampler.steps(start(4)), sampler.steps(start(6, 2))
    shapes = [(next(a).x.shape, next(b).x.shape) for _ in range(2)]
    assert shapes == [((4, 3), (2, 6, 3))] * 2


def test_half_precision_and_no_gradient_stay_finite():
    flat = steer.reward.wrap(lambda x: 0 * x.sum(1))
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert torch.equal(
            steer.guidance.control.direction(torch.zeros(2, 3, dtype=dtype)),
            torch.zeros(2, 3, dtype=dtype),
        )
        x = torch.tensor([[1e-4, 0, 0]], dtype=dtype)
        assert float(steer.guidance.control.direction(x).norm()) == pytest.approx(1, rel=1e-2)
    flow = mixture()
    done = last(FlowMapControl(flow, whole_reward(flow, flat, None), [0.0, 0.5, 1.0]), start())
    assert torch.isfinite(done.x).all()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda f, p: FlowMapControl(f, p, [0.5, 0.1]), "times must increase"),
        (lambda f, p: FlowMapControl(f, p, [0, 0.5, 1], guided=[0.3]), r"cannot guide at \[0.3\]"),
        (lambda f, p: NoiseAscent(f, p, 0), "iterations must be at least 1"),
        (lambda f, p: NoiseAscent(f, p, 2, jumps=0), "jumps must be at least 1"),
    ],
)
def test_numbers_are_checked_at_the_door(make, words):
    flow = mixture()
    with pytest.raises(ValueError, match=words):
        make(flow, whole_reward(flow, curved, None))
