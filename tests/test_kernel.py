import math

import pytest
import torch
from torch.distributions import Normal

import steer
from steer.guidance.kernel import Adaptation, Jump, Langevin, Sde
from steer.guidance.potential import Denoised, Lookahead
from steer.guidance.state import State
from steer.noise import Noise
from tests.test_flow import ByVelocity, mixture

N = 20_000


def draw(flow, n, t, seed=0):
    """Draw n samples of rho_t."""
    g = torch.Generator().manual_seed(seed)
    alpha, beta = (float(c) for c in flow.path(t))
    x_1 = flow.sample(n, g)
    return alpha * torch.randn(x_1.shape, generator=g) + beta * x_1


def moments_agree(x, y, bound=4.0):
    """Means and second moments within `bound` standard errors of two independent samples."""
    for f in (lambda z: z, lambda z: z**2, torch.cos):
        a, b = f(x), f(y)
        error = (a.mean(0) - b.mean(0)).abs()
        assert (error < bound * (a.var(0) / len(a) + b.var(0) / len(b)).sqrt()).all()


def reward(x):
    return torch.tanh(x).sum(1)


@pytest.mark.parametrize("path", [steer.Linear(), steer.Cosine()])
@pytest.mark.parametrize("churn", [0.0, 0.5, 1.0])
def test_jump_keeps_the_marginals_at_any_step(churn, path):
    flow = mixture(path)
    for s, t in [(0.0, 0.5), (0.5, 0.9)]:
        x, _ = Jump(flow, churn).propose(
            draw(flow, N, s), s, t, Lookahead(flow, reward), 0.0, Noise(1, particles=N)
        )
        moments_agree(x, draw(flow, N, t, seed=9))


def test_jump_to_the_end_is_deterministic():
    flow = mixture()
    x = draw(flow, 10, 0.8)
    y, log_ratio = Jump(flow, 1.0).propose(
        x, 0.8, 1.0, Lookahead(flow, reward), 2.0, Noise(0, particles=10)
    )
    assert torch.equal(y, flow.jump(x, 0.8, 1.0))
    assert not log_ratio.any()


def test_sde_step_is_euler_maruyama():
    flow, s, t, eps = mixture(), 0.3, 0.4, 0.7
    x = draw(flow, 50, s)
    noise = Noise(4, particles=50)
    y, _ = Sde(flow, noise=lambda t: eps).propose(x, s, t, Lookahead(flow, reward), 0.0, noise)
    z = Noise(4, particles=50).normal((3,))
    h = t - s
    drift = flow.velocity(x, s) + eps * flow.score(x, s)
    assert torch.allclose(y, x + h * drift + math.sqrt(2 * eps * h) * z, atol=1e-5)
    with pytest.raises(ValueError, match="negative"):
        Sde(flow, noise=lambda t: -1.0).propose(x, s, t, Lookahead(flow, reward), 0.0, noise)


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("make", [lambda f: Jump(f, 0.5, clip=None), Sde])
def test_shift_and_log_ratio(make, scale):
    """x' is shifted by `scale v/2 ∇r`; log-ratio is that of the two Gaussian densities."""
    flow, s, t = mixture(), 0.4, 0.5
    kernel, potential = make(flow), Lookahead(flow, reward)
    x = draw(flow, 50, s)
    plain, zero = kernel.propose(x, s, t, potential, 0.0, Noise(0, particles=50))
    shifted, log_ratio = kernel.propose(x, s, t, potential, scale, Noise(0, particles=50))
    z = Noise(0, particles=50).normal((3,))
    if isinstance(kernel, Sde):
        variance = 2 * (1 - s) * (t - s)
    else:
        u = t + 0.5 * (1 - t)
        variance = (1 - t) ** 2 - (t / u) ** 2 * (1 - u) ** 2
    gradient = potential.gradient(x, s)[1]
    assert torch.allclose(shifted - plain, scale * variance / 2 * gradient, atol=1e-5)
    mean = plain - variance**0.5 * z
    p, q = Normal(mean, variance**0.5), Normal(shifted - variance**0.5 * z, variance**0.5)
    expected = (p.log_prob(shifted) - q.log_prob(shifted)).sum(1)
    assert torch.allclose(log_ratio, expected, atol=1e-3)
    assert not zero.any()


@pytest.mark.parametrize("make", [lambda f, c: Jump(f, 1.0, clip=c), lambda f, c: Sde(f, clip=c)])
def test_clip_bounds_the_shift(make):
    """The norm is at most `c sqrt(variance d)`, whatever the gradient."""
    flow, s, t, c = mixture(), 0.4, 0.5, 0.5
    steep = Lookahead(flow, lambda x: 1000 * x.sum(1))
    x = draw(flow, 50, s)
    plain, _ = make(flow, c).propose(x, s, t, steep, 0.0, Noise(0, particles=50))
    shifted, _ = make(flow, c).propose(x, s, t, steep, 1.0, Noise(0, particles=50))
    variance = 2 * (1 - s) * (t - s) if isinstance(make(flow, c), Sde) else (1 - t) ** 2
    norms = (shifted - plain).norm(dim=1)
    assert torch.allclose(norms, torch.full((50,), c * (variance * 3) ** 0.5), rtol=1e-3)


def tilted_points(flow, t, n, seed):
    """Draw from rho_t e^{r_t} by rejection, for a linear reward of the naive view."""
    x = draw(flow, 6 * n, t, seed)
    log_w = t * reward(x)
    keep = (
        torch.rand(len(x), generator=torch.Generator().manual_seed(seed)) < (log_w - t * 3).exp()
    )
    return x[keep][:n]


@pytest.mark.parametrize("known", [True, False], ids=["density", "simpson"])
def test_langevin_leaves_the_tilt_invariant(known):
    """Exact samples of rho_t e^{r_t} stay exact samples, through many accepted moves."""
    exact, t = mixture(), 0.5
    flow = exact if known else ByVelocity(exact)
    potential = steer.Naive(flow, reward)
    x = tilted_points(exact, t, 4000, 0)
    kernel = Langevin(flow, moves=20, step_size=0.15)
    y = kernel.move(x, t, potential, Noise(0, particles=len(x)))
    assert float((y - x).abs().mean()) > 0.3
    moments_agree(y, tilted_points(exact, t, 8000, 1))


def test_unadjusted_langevin_is_biased_and_the_test_sees_it():
    flow, t = mixture(), 0.5
    potential = steer.Naive(flow, reward)
    x = tilted_points(flow, t, 4000, 0)
    kernel = Langevin(flow, moves=20, step_size=0.15, adjust=False)
    y = kernel.move(x, t, potential, Noise(0, particles=len(x)))
    with pytest.raises(AssertionError):
        moments_agree(y, tilted_points(flow, t, 8000, 1))


def test_langevin_proposes_the_jump():
    flow = mixture()
    x = draw(flow, 5, 0.3)
    noise = Noise(0, particles=5)
    y, log_ratio = Langevin(flow).propose(x, 0.3, 0.8, Lookahead(flow, reward), 1.0, noise)
    assert torch.equal(y, flow.jump(x, 0.3, 0.8))
    assert log_ratio.shape == (5,)
    assert not log_ratio.any()


def test_langevin_skips_the_end():
    flow = mixture()
    x = draw(flow, 5, 1.0)
    assert Langevin(flow).move(x, 1.0, Lookahead(flow, reward), Noise(0, particles=5)) is x


@pytest.mark.parametrize("known", [True, False], ids=["density", "simpson"])
def test_adaptation_reaches_its_acceptance_each_prompt_by_itself(known):
    """Prompt 1 is steered ten times harder, so its step must become the smaller one."""
    exact, t, n = mixture(), 0.5, 256
    flow = exact if known else ByVelocity(exact)
    potential = steer.Naive(flow, reward, temperature=torch.tensor([1.0, 0.02]))
    run, x = Adaptation(), draw(exact, 2 * n, t)
    for k in range(30):
        x = Langevin(flow).move(x, t, potential, Noise(0, range(2), n, step=k), run)
    assert ((run.acceptance - 0.57).abs() < 0.15).all()
    assert run.step[1] < 0.5 * run.step[0]


def test_what_is_known_of_a_row_is_known_of_the_row_that_was_kept():
    """Score, velocity and evaluation, of those that were accepted and of those that were not."""
    flow, t, n = ByVelocity(mixture()), 0.5, 64
    potential, x = Denoised(flow, reward), draw(mixture(), n, t)
    here = State(x, t, flow, potential)
    after = Langevin(flow, step_size=0.4).refresh(here, Noise(0, particles=n))
    stayed = (after.x == x).all(1)
    assert 0.2 < float(stayed.float().mean()) < 0.8
    flow.velocity = None  # what follows is known
    score, velocity, seen = after.score, after.velocity, after.evaluation(derivatives=True)
    del flow.velocity
    assert torch.allclose(score, flow.score(after.x, t), atol=1e-5)
    assert torch.allclose(velocity, flow.velocity(after.x, t), atol=1e-5)
    anew = potential.evaluate(after.x, t, derivatives=True)
    for name in ("value", "reward", "gradient", "partial"):
        assert torch.allclose(getattr(seen, name), getattr(anew, name).to(getattr(seen, name))), (
            name
        )


class Quartic(steer.FlowMap):
    """A flow whose score is that of `exp(-x⁴/4)` and unknown otherwise."""

    path, event_shape = steer.Linear(), (1,)
    velocity = jump = None

    def score(self, x, t):
        return -(x**3)


def test_simpsons_rule_is_exact_for_a_cubic_score():
    x, y = torch.tensor([[0.3], [-1.0]]).double(), torch.tensor([[1.1], [2.0]]).double()
    here = State(x, 0.5, Quartic(), None)
    ratio, error = Langevin._log_density_ratio(here, here.at(y, 0.5))
    exact, trapezoid = (x**4 - y**4) / 4, -(x**3 + y**3) / 2 * (y - x)
    assert torch.allclose(ratio, exact[:, 0])
    assert torch.allclose(error, (exact - trapezoid).abs()[:, 0])


def test_the_first_step_is_a_tenth_of_alpha_squared():
    flow, t = mixture(), 0.6
    x, potential = draw(flow, 8, t), Lookahead(flow, reward)
    y = Langevin(flow, adjust=False).move(x, t, potential, Noise(0, particles=8))
    h, z = 0.1 * 0.4**2, Noise(0, particles=8).normal((3,))
    drift = flow.score(x, t) + potential.gradient(x, t)[1]
    assert torch.allclose(y, x + h * drift + math.sqrt(2 * h) * z, atol=1e-6)


def test_the_step_is_adapted_by_the_acceptance_and_by_what_simpson_corrects():
    """Theory (34): `exp(2 (acceptance - .57))`, and `(.1 / median)^(2/3)` above .1."""
    run = Adaptation(step=torch.tensor([0.2, 0.2, 0.3]).double())
    log_accept = torch.tensor([[0.5, 0.5, 0.25], [1.0, 7.0, 1.0], [0.5, 0.5, 0.25]]).log()
    off = torch.tensor([[0.0, 0.8, 9.0], [0.0, 0.05, 9.0], [2.7, 2.7, 0.0]])
    Langevin._adapt(run, log_accept.flatten(), off.flatten())
    mean = torch.tensor([1.25 / 3, 1.0, 1.25 / 3]).double()
    assert torch.allclose(run.acceptance.double(), mean)
    by = (2 * (mean - 0.57)).exp() * torch.tensor([1 / 4, 1.0, 1 / 9]).double()
    assert torch.allclose(run.step, torch.tensor([0.2, 0.2, 0.3]).double() * by, atol=1e-7)


def test_langevin_without_gradient_is_still_exact():
    flow, t = mixture(), 0.5
    blind = steer.reward.wrap(lambda x: reward(x).detach(), differentiable=False)
    x = tilted_points(flow, t, 4000, 0)
    y = Langevin(flow, moves=20, step_size=0.1).move(
        x, t, steer.Naive(flow, blind), Noise(0, particles=len(x))
    )
    assert float((y - x).abs().mean()) > 0.2
    moments_agree(y, tilted_points(flow, t, 8000, 1))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda f: Jump(f, 1.5), "churn"),
        (lambda f: Langevin(f, moves=-1), "moves"),
        (lambda f: Langevin(f, step_size=0.0), "step_size"),
    ],
)
def test_bad_kernels(make, words):
    with pytest.raises(ValueError, match=words):
        make(mixture())
