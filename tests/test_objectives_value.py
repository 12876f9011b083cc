"""The value tilt and adjoint matching against closed forms: draws, fixed points, laws."""

import functools

import pytest
import torch
from torch import nn

import steer
from benchmarks import tilt_toys
from steer.flow import FlowMap
from steer.noise import Draws
from steer.objectives.adjoint import Adjoint, memoryless
from steer.objectives.batch import Batch
from steer.objectives.transport import Transport
from steer.objectives.value import Value, slot, tilt_gain
from steer.path import as_time, like
from steer.posterior import glass
from steer.reward import wrap

A = torch.tensor([0.9, -0.5])


@functools.cache  # a mixture's first jump chooses its steps
def mixture(kind=steer.Linear):
    means = torch.tensor([[-1.5, 0.0], [1.5, 0.5]])
    return steer.GaussianMixture(means, torch.tensor([0.4, 0.2]), torch.tensor([0.6, 0.4]), kind())


class Between(FlowMap):
    """v = b + θ (b^q - b), θ one a row: the base at θ = 0, the exact tilt at 1."""

    def __init__(self, base, tilted, theta):
        super().__init__()
        self.base, self.tilted = base, tilted
        self.path, self.event_shape = base.path, base.event_shape
        self.theta = nn.Parameter(theta)

    def velocity(self, x, t):
        b = self.base.velocity(x, t)
        return b + like(self.theta, x) * (self.tilted.velocity(x, t) - b)

    def jump(self, x, s, t, steps=8):
        h = (as_time(t) - as_time(s)) / steps
        for k in range(steps):
            v = self.velocity(x, s + k * h)
            w = self.velocity(x + like(h, x) * v, (s + (k + 1) * h).clamp(max=0.999))
            x = x + like(h / 2, x) * (v + w)
        return x


def z_score(objective, theta, n, kind=steer.Linear):
    """The mean gradient in θ over its standard error, of n rows, each with a θ of its own."""
    base, reward = mixture(kind), steer.LinearReward(A)
    student = Between(base, base.tilt(reward)[0], torch.full((n,), theta))
    batch = Batch(student, base, student, reward, 1.0, Draws(0, 0, (0, n)))
    (g,) = torch.autograd.grad(objective(batch)["loss"], student.theta)
    return float(g.mean() / (g.std() / n**0.5))


# ------------------------------------------------------------------ draws of the posterior


@pytest.mark.parametrize("kind", [steer.Linear, steer.Cosine, steer.VariancePreserving])
@pytest.mark.parametrize("t", [0.05, 0.5, 0.9])
def test_glass_draws_the_posterior(kind, t):
    """Mean within .06 standard deviations, covariance within 15 %, at 8 steps and 4,000 draws."""
    flow, n, g = mixture(kind), 4000, torch.Generator().manual_seed(0)
    x = flow.jump(torch.randn(3, 2, generator=g), 0.0, t)
    exact = flow.posterior_sample(x, t, 10_000, g).transpose(0, 1)
    drawn = glass(flow, x.repeat_interleave(n, 0), t, torch.randn(3 * n, 2, generator=g), 8)
    for a, b in zip(drawn.reshape(3, n, 2), exact, strict=True):
        assert ((a.mean(0) - b.mean(0)) / b.std(0)).abs().max() < 0.06
        gap = torch.cov(a.T) - torch.cov(b.T)
        assert gap.norm() < 0.15 * torch.cov(b.T).norm()


def test_glass_is_exact_for_standard_normal_data():
    """x_1 | x_t ~ N(β x / r², α² / r²): linear in x and z, so its gradients are known too."""
    flow = steer.GaussianMixture(torch.zeros(1, 2), 1.0)
    g = torch.Generator().manual_seed(0)
    x, z = torch.randn(2, 5, 2, generator=g, dtype=torch.float64)
    t = torch.tensor([0.0, 0.2, 0.5, 0.9, 1.0], dtype=torch.float64)
    x.requires_grad_()
    y = glass(flow, x, t, z, 3)
    r = torch.hypot(1 - t, t)
    assert torch.allclose(y, like(t / r**2, x) * x + like((1 - t) / r, x) * z, atol=1e-6)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.allclose(gradient, like(t / r**2, x).expand(5, 2), atol=1e-6)


def test_glass_has_the_posteriors_gradient():
    """∇ E[x_1 | x_t = x] = (β/α²) Cov(x_1 | x_t = x), within 5 %, of 4,000 pathwise gradients."""
    flow, n, t = mixture(), 4000, 0.4
    g = torch.Generator().manual_seed(0)
    x = torch.tensor([[0.2, 0.1]]).expand(n, 2).clone().requires_grad_()
    y = glass(flow, x, t, torch.randn(n, 2, generator=g), 8)
    found = torch.stack([torch.autograd.grad(y[:, i].mean(), x, retain_graph=True)[0].sum(0)
                         for i in range(2)])  # fmt: skip
    point = x[:1].detach()
    exact = torch.autograd.functional.jacobian(lambda x: flow.denoise(x, t).sum(0), point)[:, 0]
    assert (found - exact).norm() < 0.05 * exact.norm()


def test_the_gain_of_a_tilt():
    """Linear: 1/(1-t), (1-t)/t; any path: b = (α'/α) x + κ D."""
    t = torch.tensor([0.1, 0.5, 0.8], dtype=torch.float64)
    kappa, half = tilt_gain(steer.Linear(), t)
    assert torch.allclose(kappa, 1 / (1 - t))
    assert torch.allclose(half, (1 - t) / t)
    flow, x = mixture(steer.Cosine), torch.ones(3, 2, dtype=torch.float64)
    kappa, _ = tilt_gain(flow.path, t)
    rate = flow.path.derivative(t)[0] / flow.path(t)[0]
    b = like(rate, x) * x + like(kappa, x) * flow.denoise(x, t)
    assert torch.allclose(flow.velocity(x, t), b)


# ------------------------------------------------------------------ fixed points

WAYS = {
    "gradient": {},
    "two draws": {"draws": 2},
    "no gradient": {"gradient": False},
    "no gradient, two draws": {"gradient": False, "draws": 2},
    "student": {"policy": "student"},
}


@pytest.mark.parametrize("way", WAYS)
def test_the_value_tilts_fixed_point(way):
    """Zero within 4 SE at the exact tilt's velocity, more than 10 SE from it elsewhere."""
    objective = Value(**WAYS[way], steps=8, distil=0.0)
    assert objective.differentiable == ("no" not in way)
    z_score(objective, 0.0, 1024)  # the running constant settles
    assert abs(z_score(objective, 1.0, 6144)) < 4
    assert z_score(objective, 0.5, 6144) < -10
    assert z_score(objective, 2.0, 6144) > 10


def test_the_fixed_points_of_another_path():
    for objective in (Value(steps=8, distil=0.0), Adjoint(steps=32, distil=0.0)):
        z_score(objective, 0.0, 1024, steer.Cosine)
        assert abs(z_score(objective, 1.0, 4096, steer.Cosine)) < 4
        assert z_score(objective, 0.0, 4096, steer.Cosine) < -10


def test_adjoint_matchings_fixed_point():
    objective = Adjoint(steps=32, subset=4, distil=0.0)
    assert abs(z_score(objective, 1.0, 2048)) < 4
    assert z_score(objective, 0.5, 4096) < -10
    assert z_score(objective, 2.0, 4096) > 10


def test_adjoint_matchings_pull():
    """`(σ²/2) a`, which is (1-t)/t a on the linear path; at t = 0 by the first step's end."""
    flow, objective = mixture(), Adjoint(steps=4, subset=4, distil=0.0)
    batch = Batch(flow, flow, flow, steer.LinearReward(A), 1.0, Draws(0, 0, (0, 8)))
    now, later = torch.randn(2, 8, 2, generator=torch.Generator().manual_seed(0))
    times = [0.0, 0.2, 0.5, 0.8, 1.0]
    assert torch.allclose(objective.pull(batch, times, 0, now, later), 0.8**2 / 0.2 * later)
    assert torch.allclose(objective.pull(batch, times, 1, now, later), 0.8 / 0.2 * now)
    assert torch.allclose(objective.pull(batch, times, 3, now, later), 0.2 / 0.8 * now)
    states = objective.rollout(batch, times)
    value, found = objective.adjoints(batch, times, states, 1)
    assert torch.allclose(value, states[-1] @ A)
    assert len(found) == 4
    assert torch.allclose(found[-1], -A.expand(8, 2))
    assert objective(batch)["loss"].isfinite()  # each of the steps is trained


class Pushed(FlowMap):
    """Base N(0, 1), linear path and θ times the transport optimum's control for R = a x.

    With `Φ_t² = (1-t)² + t²`: b_t(x) = Φ'/Φ x, u_t = θ a Φ_1/Φ_t, and
    X(s,t,x) = Φ_t/Φ_s x + θ a Φ_1 Φ_t (atan(2t-1) - atan(2s-1)).
    """

    def __init__(self, a, theta):
        super().__init__()
        self.path, self.event_shape = steer.Linear(), (1,)
        self.a, self.theta = a, nn.Parameter(torch.tensor(theta))

    @staticmethod
    def times(*times):
        return (torch.as_tensor(t).reshape(-1, 1) for t in times)

    def velocity(self, x, t):
        (t,) = self.times(t)
        square = (1 - t) ** 2 + t**2
        return (2 * t - 1) / square * x + self.theta * self.a / square.sqrt()

    def jump(self, x, s, t):
        s, t = self.times(s, t)
        start, end = (((1 - u) ** 2 + u**2).sqrt() for u in (s, t))
        way = torch.atan(2 * t - 1) - torch.atan(2 * s - 1)
        return end / start * x + self.theta * self.a * end * way


def test_the_transport_tilts_fixed_point():
    """The gradient of V has no noise here: the optimum's loss is zero to rounding."""
    reward = steer.LinearReward(torch.tensor([0.8]))
    found = {}
    for theta in (0.7, 1.0, 1.3):
        student, base = Pushed(0.8, theta), Pushed(0.8, 0.0)
        batch = Batch(student, base, student, reward, 1.0, Draws(0, 0, (0, 512)))
        out = Transport(distil=0.0)(batch)
        (g,) = torch.autograd.grad(out["loss"], student.theta)
        found[theta] = float(g), float(out["loss"].detach())
    assert abs(found[1.0][0]) < 1e-5
    assert found[1.0][1] < 1e-9
    assert found[0.7][0] < -0.1
    assert found[1.3][0] > 0.1


def test_the_map_of_the_transport_optimum_follows_its_velocity():
    """What the test above rests on: the Lagrangian rule, and the closed form's own distil."""
    flow = Pushed(0.8, 1.0)
    x = torch.linspace(-1, 1, 5, dtype=torch.float64)[:, None]
    s, t, h = (torch.tensor(u, dtype=torch.float64) for u in (0.2, 0.7, 1e-4))
    rate = (flow.jump(x, s, t + h) - flow.jump(x, s, t - h)) / (2 * h)
    assert torch.allclose(rate, flow.velocity(flow.jump(x, s, t), t), atol=1e-5)


@pytest.mark.slow
def test_the_law_of_the_tuned_flow():
    """600 steps of 256 rows: the velocity at the floor of 2,048 samples, the map near it.

    The base is 1.5 standard deviations away, and at a sliced distance of 1.27; the floor is .08.
    """
    found = tilt_toys.run(tilt_toys.OBJECTIVES["value, student's points"], seeds=1, steps=600)
    velocity, four, one = (found[way] for way in ("32 Heun steps", "4 jumps", "1 jump"))
    for way in (velocity, four, one):
        assert way["mean"] < 0.1
    assert velocity["covariance"] < 0.15  # fresh samples of the tilt: .10
    assert four["covariance"] < 0.15
    assert velocity["sliced"] < 0.12
    assert four["sliced"] < 0.16
    assert one["sliced"] < 0.22


# ------------------------------------------------------------------ parts


@pytest.mark.parametrize("path", [steer.Linear(), steer.Cosine(), steer.VariancePreserving()])
def test_memoryless_steps_keep_the_marginals_of_a_point(path):
    """For data at one point D is that point, and the step is exact at any length."""
    for s, t in ((0.0, 0.3), (0.3, 0.8), (0.5, 1.0)):
        a, b, v = memoryless(path, s, t)
        (alpha_s, beta_s), (alpha, beta) = path(s), path(t)
        assert torch.allclose(a * beta_s + b, beta)  # the mean, at x_1 = 1
        assert torch.allclose(a**2 * alpha_s**2 + v, alpha**2, atol=1e-12)
    assert float(memoryless(path, 0.0, 0.3)[0]) == 0


def test_weights_are_those_of_the_other_draws():
    """c is the log-mean of exp R over the other draws and the running estimate."""
    objective, flow = Value(draws=2), mixture()
    batch = Batch(flow, flow, flow, steer.LinearReward(A), 1.0, Draws(0, 0, (0, 2)))
    r = torch.tensor([[0.0, 1.0], [2.0, -1.0]])
    first = r.exp().mean()  # the first batch is its own estimate
    w = objective.weigh(batch, r)
    assert torch.allclose(w, r.exp() / ((r.flip(1).exp() + first) / 2))
    second = objective.weigh(batch, r + 1)
    assert torch.allclose(second, (r + 1).exp() / (((r + 1).flip(1).exp() + first) / 2))
    kept = Value(draws=2)
    kept.load_state_dict(objective.state_dict())
    assert torch.equal(kept.weigh(batch, r), objective.weigh(batch, r))
    clipped = Value(draws=2, max_log_w=0.5).weigh(batch, r)
    assert float(clipped.log().max()) == pytest.approx(0.5)


def test_the_running_estimate_moves_by_a_twentieth():
    """`exp(log z) <- .95 exp(log z) + .05 mean exp(R)`, each prompt by itself."""
    objective, flow = Value(), mixture()
    batch = Batch(
        flow, flow, flow, steer.LinearReward(A), 1.0, Draws(0, 0, (0, 4)), prompts=["a", "b"]
    )
    first, second = torch.tensor([[0.0, 1.0], [2.0, 2.0]]), torch.tensor([[3.0, 1.0], [2.0, 0.0]])
    for r in (first, second):
        objective.weigh(batch, r.reshape(4, 1))
    z = 0.95 * first.exp().mean(1) + 0.05 * second.exp().mean(1)
    at = [slot("a"), slot("b")]
    assert torch.allclose(objective.log_z[at].exp(), z.double())
    assert int((~objective.log_z.isnan()).sum()) == 2


def test_weights_of_each_prompt():
    """A prompt's running constant is its own: another scale of its rewards changes nothing."""
    objective, flow = Value(), mixture()
    reward, r = steer.LinearReward(A), torch.tensor([[0.0], [1.0], [0.0], [1.0]])
    batch = Batch(flow, flow, flow, reward, 1.0, Draws(0, 0, (0, 4)), prompts=["a", "b"])
    w = objective.weigh(batch, r + torch.tensor([0.0, 0.0, 50.0, 50.0])[:, None])
    assert torch.allclose(w[:2], w[2:])
    alone = Batch(flow, flow, flow, reward, 1.0, Draws(0, 1, (0, 2)), prompts=["b"])
    assert torch.allclose(objective.weigh(alone, r[:2] + 50), w[:2])


def test_at_the_start_the_student_is_the_base():
    """No tilt: where R is constant, the loss is zero at the base."""
    flow = mixture()
    batch = Batch(flow, flow, flow, wrap(lambda x: 0 * x[:, 0]), 1.0, Draws(0, 0, (0, 8)))
    for objective in (Value(distil=0.0), Value(False, distil=0.0), Adjoint(distil=0.0)):
        assert float(objective(batch)["loss"]) < 1e-9


def test_rewards_without_gradient_are_enough():
    flow = mixture()
    reward = wrap(lambda x: (x[:, 0] > 0).float(), differentiable=False)
    student = Between(flow, flow, torch.zeros(8))
    batch = Batch(student, flow, student, reward, 1.0, Draws(0, 0, (0, 8)))
    for objective in (Value(gradient=False), Value(gradient=False, draws=2, policy="student")):
        assert not objective.differentiable
        assert torch.isfinite(objective(batch)["loss"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Value(draws=0), "one x_1 for each x_t"),
        (lambda: Value(steps=1), "4 to 8"),
        (lambda: Value(policy="old"), "'base' or 'student'"),
        (lambda: Value(max_log_w=0.0), "None leaves it unbounded"),
        (lambda: Value(ends=0.0), r"\[e, 1 - e\]"),
        (lambda: Value(distil=-1.0), "distil must not be negative"),
        (lambda: Adjoint(steps=1), "16 or more"),
        (lambda: Adjoint(subset=17), "between 1 and steps = 16"),
        (lambda: Adjoint(distil=-1.0), "distil must not be negative"),
        (lambda: glass(mixture(), torch.zeros(1, 2), 0.5, torch.zeros(1, 2), 1), "at least 2"),
    ],
)
def test_wrong_options_say_what_to_do(make, message):
    with pytest.raises(ValueError, match=message):
        make()
