"""The objectives without a gradient of the reward: identities, first steps, and what they gain."""

import copy
import functools

import pytest
import torch
from torch import nn

import steer
from benchmarks.tuning_toys import GRADIENT, StandardNormal, Toy, bump, gain, slope, tune
from steer.adapters.inject import adapt
from steer.models.two_time import NetworkFlow, TwoTimeUNet
from steer.noise import Draws
from steer.objectives.batch import Batch
from steer.objectives.derivative import derivative
from steer.objectives.direct import Direct
from steer.objectives.grpo import GRPO, KNOTS
from steer.objectives.nft import NFT
from steer.objectives.policy import advantages
from steer.path import like
from steer.reward import LinearReward, wrap
from steer.sampling.counts import Counted, Counts
from steer.testing import Corrected

FREE = {
    "nft, velocity": lambda: NFT(diagonal=1.0, jumps=(1,)),
    "nft, jumps": lambda: NFT(diagonal=0.0, jumps=(1,)),
    "grpo": lambda: GRPO(steps=3),
}
free = pytest.mark.parametrize("build", FREE.values(), ids=FREE)


def mixture(path=None):
    means = torch.tensor([[-1.0, 0.5], [1.5, 0.0]])
    return steer.GaussianMixture(means, torch.tensor([0.4, 0.2]), path=path)


@functools.cache
def tuned():
    """A network on a Gaussian whose adapters are at step 0, so that only B has a gradient."""
    student = adapt(Corrected(steer.GaussianMixture(torch.zeros(1, 2), 0.5)), rank=4)
    student.add("average")
    for p in student.adapters().values():
        p.requires_grad_(True)
    return student


def batch_of(reward, step=0, rows=64, prompts=None):
    student = tuned()
    draws = Draws(0, step, (0, rows))
    return Batch(
        student, student.base, student.at(adapter="average"), wrap(reward), 1.0, draws, prompts
    )


def gradient(objective, batch):
    """The loss's gradient, flat."""
    parameters = list(tuned().adapters().values())
    grads = torch.autograd.grad(objective(batch)["loss"], parameters, allow_unused=True)
    parts = [
        torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)
    ]
    return torch.cat([g.flatten() for g in parts]).double()


# ------------------------------------------------------------------ the identity


@pytest.mark.parametrize("path", [steer.Linear(), steer.Cosine()], ids=["linear", "cosine"])
def test_mean_flow_identity_has_this_sign(path):
    """`u - (t-s) d` is the marginal velocity at s; with the other sign it is far off."""
    flow = mixture(path).double()
    g = torch.Generator().manual_seed(0)
    x = torch.randn(64, 2, generator=g, dtype=torch.float64)
    s = 0.05 + 0.6 * torch.rand(64, generator=g, dtype=torch.float64)
    t = s + 0.1 + (0.9 - s) * torch.rand(64, generator=g, dtype=torch.float64)
    v = flow.velocity(x, s)
    u = (flow.jump(x, s, t) - x) / like(t - s, x)
    turn = like(t - s, x) * derivative(flow, x, s, t, v, step=0.005)
    error = (u - turn - v).norm() / v.norm()
    assert error < 2e-3
    assert (u + turn - v).norm() / v.norm() > 0.2
    assert (u - v).norm() / v.norm() > 0.1


def test_the_velocity_that_jumps_imply_is_that_of_their_flow():
    """`v_b + (u_θ - u_b) - (t-s) (d_old - d_b)` is v_old where the student is an exact map."""
    means = torch.tensor([[-0.5, 1.0], [1.0, -0.5]])
    base, new = mixture().double(), steer.GaussianMixture(means, 0.5).double()
    draws = Draws(0, 0, (0, 256), dtype=torch.float64)
    batch = Batch(new, base, new, wrap(lambda x: x.sum(1)), 1.0, draws)
    x_1 = new.jump(batch.noise(), 0.0, 1.0)
    seen, old, before, _ = NFT(diagonal=0.0)._velocities(batch, x_1)
    assert (seen - old).norm() / old.norm() < 0.01
    assert (before - old).norm() / old.norm() > 0.2


def test_derivative_is_one_sided_at_the_start():
    flow = mixture().double()
    x = torch.randn(32, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    s, t = torch.zeros(32, dtype=torch.float64), torch.ones(32, dtype=torch.float64)
    v = flow.velocity(x, s)
    u = flow.jump(x, s, t) - x
    assert (u - derivative(flow, x, s, t, v) - v).norm() / v.norm() < 2e-2


class Closed(nn.Module):
    """A layer of one's own that knows no derivative in forward mode."""

    class _Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return torch.sin(x)

    def forward(self, x):
        return self._Function.apply(x)


@pytest.fixture(scope="module")
def two_time():
    """A small network at random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = TwoTimeUNet(["fox"], channels=[16, 32], blocks=[1, 1], size=16, width=32)
        for p in network.parameters():
            p.data = torch.randn_like(p) * p[0].numel() ** -0.5
    return network


def states(rows=16, size=16):
    g = torch.Generator().manual_seed(0)
    x, v = torch.randn(2, rows, 3, size, size, generator=g)
    s = 0.02 + 0.6 * torch.rand(rows, generator=g)
    return x, s, s + 0.1 + 0.25 * torch.rand(rows, generator=g), v


@pytest.mark.parametrize("layer", [nn.SiLU, Closed])
def test_the_derivative_of_coarse_weights_is_as_exact_as_their_velocity(layer):
    """bf16 against the same weights in float64: the difference of near values is far off."""
    coarse = steer.load("emoji", dtype=torch.bfloat16).given(["fox", "red apple"])
    coarse.network.start.mlp[1] = layer()
    x, s, t, v = states(8, 32)
    exact = copy.deepcopy(coarse).double()
    wide = [y.double() for y in (x, s, t, v)]
    with torch.no_grad():
        velocity, known = exact.velocity(*wide[:2]), derivative(exact, *wide, step=1e-4)
        velocity_off, off, drowned = (
            float((found - right).norm() / right.norm())
            for found, right in (
                (coarse.velocity(x, s), velocity),
                (derivative(coarse, x, s, t, v), known),
                (difference(coarse, x, s, t, v), known),
            )
        )
    assert velocity_off < 0.01
    assert off < 0.02
    assert drowned > 0.1


def difference(flow, x, s, t, v, step=0.01):
    def u(at):
        y = x + like(at - s, x) * v
        return (flow.jump(y, at, t) - y) / like(t - at, x)

    return (u(s + step) - u(s - step)) / (2 * step)


def test_the_derivative_of_single_weights_is_the_difference(two_time):
    """Runs that were begun before go on bit for bit; both ways agree to the step's square."""
    x, s, t, v = states()
    flow = NetworkFlow(two_time)
    with torch.no_grad():
        found = derivative(flow, x, s, t, v)
        assert torch.allclose(found, difference(flow, x, s, t, v), rtol=0, atol=1e-5)


def test_a_derivative_in_forward_mode_counts_as_two_calls(two_time):
    x, s, t, v = states(rows=3)
    for kind in (torch.float32, torch.bfloat16):
        counts = Counts()
        derivative(Counted(NetworkFlow(copy.deepcopy(two_time).to(kind)), counts), x, s, t, v)
        assert counts.forward == 6


# ------------------------------------------------------------------ advantages


def test_advantages_are_relative_to_the_group_and_pooled():
    value = torch.tensor([1.0, 3.0, 10.0, 10.0])
    a, sigma = advantages(value, 2)
    assert sigma == 1  # ((-1)² + 1² + 0 + 0) / (4 - 2)
    assert a.tolist() == [-1, 1, 0, 0]


class Moved(steer.FlowMap):
    """A flow whose velocity is moved by a θ of each row."""

    def __init__(self, flow, rows):
        super().__init__()
        self.flow, self.path, self.event_shape = flow, flow.path, flow.event_shape
        self.theta = torch.nn.Parameter(torch.zeros(rows, *flow.event_shape))

    def velocity(self, x, t):
        return self.flow.velocity(x, t) + self.theta

    def jump(self, x, s, t):
        return self.flow.jump(x, s, t)


def test_nft_pulls_by_the_advantage_up_to_its_largest():
    """At V_θ = v_old the gradient is `2 β (2r - 1) (v_old - v)` over all numbers of the batch."""
    flow, seen = mixture(), []
    student = Moved(flow, 64)

    def reward(x):  # one row stands out by eight deviations
        seen.append(20.0 * (torch.arange(len(x)) == 7) + torch.tanh(x[:, 0]))
        return seen[-1]

    def pull(m):
        draws = Draws(0, 0, (0, 64))
        batch = Batch(student, flow, flow, wrap(reward, differentiable=False), 1.0, draws)
        loss = NFT(max_advantage=m, diagonal=1.0, jumps=(1,))(batch)["loss"]
        return torch.autograd.grad(loss, student.theta)[0]

    whole, some = pull(1e-6), pull(5.0)
    advantage, _ = advantages(seen[0], 64)
    assert float(advantage.max()) > 6
    sign = (advantage / 5).clamp(max=1)
    assert torch.allclose(some, sign[:, None] * advantage.sign()[:, None] * whole, rtol=1e-3)


def test_grpos_times_are_one_in_each_bin():
    low, high = KNOTS
    for step in range(20):
        times = GRPO(steps=4).knots(batch_of(lambda x: x.sum(1), step))
        assert (times[0], times[-1], len(times)) == (0.0, 1.0, 5)
        at = [(t - low) / (high - low) * 3 for t in times[1:-1]]
        assert [int(a) for a in at] == [0, 1, 2]


def test_rounding_is_no_advantage():
    a, _ = advantages(torch.tensor([0.3, 0.1 + 0.2, 0.3 + 3e-8, 0.3]), 4)
    assert a.abs().max() < 0.02


@pytest.mark.parametrize("objective", [NFT(), GRPO()], ids=["nft", "grpo"])
def test_a_group_of_one_is_refused(objective):
    with pytest.raises(ValueError, match="at least 2 rows of each prompt"):
        objective(batch_of(lambda x: x[:, 0], rows=3, prompts=["a", "b", "c"]))


# ------------------------------------------------------------------ the first step


@free
def test_a_constant_reward_moves_nothing(build):
    """No advantage, and the base is where the penalty holds: the gradient is rounding."""
    got = gradient(build(), batch_of(lambda x: torch.ones(len(x))))
    uphill = gradient(build(), batch_of(lambda x: x[:, 0]))
    assert got.norm() < 1e-3 * uphill.norm()


@free
def test_a_reward_of_noise_moves_nothing_on_average(build):
    """A reward that knows nothing of x has a gradient, whose mean is zero."""
    along = -gradient(Direct(jumps=(1,), anchor=0.0), batch_of(LinearReward([1.0, 0.0])))
    along = along / along.norm()
    slopes = []
    for step in range(24):
        coin = torch.Generator().manual_seed(step)
        batch = batch_of(lambda x, g=coin: torch.randn(len(x), generator=g), step)
        slopes.append(float(gradient(build(), batch) @ along))
    slopes = torch.tensor(slopes)
    assert slopes.std() > 0
    assert slopes.mean().abs() < 4 * slopes.std() / len(slopes) ** 0.5


@free
def test_the_first_step_is_uphill(build):
    """Along the gradient of the reward itself, by more than ten standard errors."""
    reward = LinearReward(torch.tensor([1.0, -0.5]))
    along = -gradient(Direct(jumps=(1,), anchor=0.0), batch_of(reward, rows=1024))
    slopes = torch.tensor(
        [float(-gradient(build(), batch_of(reward, step)) @ along) for step in range(24)]
    )
    assert slopes.mean() > 10 * slopes.std() / len(slopes) ** 0.5


@free
def test_only_adapters_have_a_gradient_and_the_batch_fixes_it(build):
    values = [build()(batch_of(lambda x: x[:, 0], 3)) for _ in range(2)]
    assert torch.equal(values[0]["loss"], values[1]["loss"])
    trained = {name for name, p in tuned().flow.named_parameters() if p.requires_grad}
    assert trained == set(tuned().adapters())
    assert all(torch.isfinite(v).all() and not v.shape for v in values[0].values())


@free
def test_reward_needs_no_gradient(build):
    seen = []

    def counted(x):
        assert not x.requires_grad
        seen.append(len(x))
        return x[:, 0].round()

    build()(batch_of(counted, rows=16))["loss"].backward()
    tuned().zero_grad()
    assert seen == [16]


def test_trained_transitions_estimate_all_of_them():
    """A random one of the transitions, weighted, has the mean of all: compared at one rollout."""
    batch = functools.partial(batch_of, lambda x: x[:, 0], 5, 32)
    whole = gradient(GRPO(steps=3), batch())
    picks = {}
    for k in range(2):
        objective = GRPO(steps=3, trained=1)
        objective._chosen = lambda batch, count, k=k: [k]
        picks[k] = gradient(objective, batch())
    torch.testing.assert_close((picks[0] + picks[1]) / 2, whole, rtol=1e-4, atol=1e-7)
    assert objective(batch())["loss"].isfinite()


@pytest.mark.parametrize("part", ["distil", "consistency"])
def test_parts_are_reported(part):
    objective = NFT(distil=0.5) if part == "distil" else GRPO(consistency=0.5)
    assert ("off" if part == "distil" else "consistency") in objective(
        batch_of(lambda x: x[:, 0], rows=16)
    )


# ------------------------------------------------------------------ options


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: NFT(beta=0.0), "beta must be above 0"),
        (lambda: NFT(max_advantage=-1.0), "max_advantage must be above 0"),
        (lambda: NFT(kl=-0.1), "kl must not be negative"),
        (lambda: NFT(jumps=()), "jumps must be numbers of at least 1"),
        (lambda: NFT(diagonal=1.5), "diagonal must be a fraction"),
        (lambda: NFT(group=1), "group must be at least 2"),
        (lambda: GRPO(group=1), "group must be at least 2"),
        (lambda: GRPO(steps=1), "only a jump before it has a likelihood"),
        (lambda: GRPO(churn=(0.0,)), "without noise there is no likelihood"),
        (lambda: GRPO(churn=(1.5,)), "at most 1"),
        (lambda: GRPO(trained=4), "between 1 and steps - 1 = 3"),
        (lambda: GRPO(consistency=-1.0), "consistency must not be negative"),
    ],
)
def test_wrong_options_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


# ------------------------------------------------------------------ short runs


def test_the_toy_on_the_line_is_its_mixture():
    flow, x = StandardNormal(), torch.linspace(-2, 2, 9)[:, None]
    exact = steer.GaussianMixture(torch.zeros(1, 1), 1.0)
    torch.testing.assert_close(flow.velocity(x, 0.3), exact.velocity(x, 0.3))
    torch.testing.assert_close(flow.jump(x, 0.2, 0.9), exact.jump(x, 0.2, 0.9), atol=1e-4, rtol=0)


@pytest.mark.parametrize("build", [NFT, GRPO], ids=["nft", "grpo"])
def test_a_short_run_gains_what_the_gradient_gains(build):
    """The published toy on the line: ten times the calls of `Direct`'s gain of .25 at its rest."""
    student, ((calls, got),) = tune(bump(), build(), 100)
    assert calls == 3200
    assert got > 0.8 * 0.25
    assert gain(bump(), student.at(adapter="average"), 4) > 0.8 * 0.25


@pytest.mark.slow
@pytest.mark.parametrize("toy", [bump(), slope()], ids=["bump", "slope"])
@pytest.mark.parametrize("build", [NFT, GRPO], ids=["nft", "grpo"])
def test_gain_against_reward_calls(build, toy):
    """At least 80 % of the gradient's gain within ten times its calls."""
    _, ((_, goal),) = tune(toy, GRADIENT(), 100)
    _, curve = tune(toy, build(), 1000, every=100)
    assert curve[-1][1] >= 0.8 * goal


@pytest.mark.slow
def test_nft_rests_at_the_exponential_tilt():
    """A linear reward of Gaussian data: at kl = 1, the mean moves by `a` times the variance."""
    flow = steer.GaussianMixture(torch.zeros(1, 1), 1.0)
    toy = Toy(StandardNormal(), LinearReward(torch.tensor([1.0])), 1.0)
    _, curve = tune(toy, NFT(kl=1.0), 800, 64, every=20)
    late = torch.tensor([g for _, g in curve[20:]])
    exact = float(flow.tilt(toy.reward)[0].means)
    assert abs(float(late.mean()) - exact) < 0.15
