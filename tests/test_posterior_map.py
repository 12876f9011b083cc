"""Draws of the clean posterior against the closed form: by GLASS, re-noising and a trained map."""

import copy
import math

import pytest
import torch
from torch.distributions import MultivariateNormal

import steer
from steer.models.posterior import PosteriorMLP, Preconditioned
from steer.posterior import Glass, PosteriorMap, WeightedRenoise, glass_velocity
from steer.training.average import follow
from steer.training.optim import MuonAdamW, warm_cosine
from steer.training.posterior import PosteriorFlow, PosteriorObjective
from steer.training.rules.lagrangian import LMD, LSD, Heun
from steer.training.rules.semigroup import PSD
from tests.test_flow import ByVelocity

REWARD = steer.LinearReward(torch.tensor([0.8, -0.5]))
POINTS = [(0.3, torch.tensor([0.87, 0.38])), (0.6, torch.tensor([0.24, 0.91]))]
PATHS = [steer.Linear(), steer.Cosine(), steer.VariancePreserving()]
ROWS, DRAWS = 40, 300


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def three_modes(path=None):
    """About unit variance in each direction."""
    cov = [[[0.20, 0.08], [0.08, 0.15]], [[0.12, -0.05], [-0.05, 0.25]], [[0.18, 0], [0, 0.18]]]
    means = torch.tensor([[-1.2, 0.4], [0.8, 1.0], [0.3, -1.1]])
    return steer.GaussianMixture(means, torch.tensor(cov), torch.tensor([0.3, 0.45, 0.25]), path)


def posterior(m, x, t):
    """`p(x_1 | x_t = x)` of one x (d,), by Bayes' rule in each component: a mixture again."""
    (alpha, beta), x, cov = (float(c) for c in m.path(t)), x.double(), m.covariances
    total = alpha**2 * torch.eye(len(x)) + beta**2 * cov
    log_w = m.weights.log() + MultivariateNormal(beta * m.means, total).log_prob(x)
    gain = beta * cov @ torch.linalg.inv(total)
    left = alpha**2 * cov @ torch.linalg.inv(total)
    means = m.means + (gain @ (x - beta * m.means)[..., None])[..., 0]
    return steer.GaussianMixture(means, (left + left.mT) / 2, log_w.softmax(0))


def moments(q):
    """Mean (d,), covariance (d, d) of a mixture."""
    mean = q.weights @ q.means
    gap = q.means - mean
    return mean, torch.einsum(
        "k,kij->ij", q.weights, q.covariances + gap[:, :, None] * gap[:, None]
    )


def compare(sampler, m, x, t, seed=0):
    """Return error and standard error of the mean, the covariance and `E[e^r]`, and their scales.

    Rows are drawn apart from each other: the standard error is that of their averages.
    """
    q = posterior(m, x, t)
    mean, cov = moments(q)
    with torch.no_grad():
        y = sampler.sample(x.expand(ROWS, 2).clone(), t, DRAWS, rng(seed)).double()
    assert y.shape == (DRAWS, ROWS, 2)
    gap = y - mean
    products = torch.stack([gap[..., 0] ** 2, gap[..., 1] ** 2, gap[..., 0] * gap[..., 1]], -1)
    tilt = REWARD(y.flatten(0, 1)).exp().reshape(DRAWS, ROWS, 1)
    found = torch.cat([y, products, tilt], -1).mean(0)
    evidence = q.tilt(REWARD)[1].exp()[None]
    exact = torch.cat([mean, cov[[0, 1, 0], [0, 1, 1]], evidence])
    return found.mean(0) - exact, found.std(0) / ROWS**0.5, scales(cov, evidence)


def scales(cov, evidence):
    sd = cov.diagonal().sqrt()
    return torch.cat([sd, torch.stack([sd[0] ** 2, sd[1] ** 2, sd[0] * sd[1]]), evidence])


class Exact:
    def __init__(self, m):
        self.sample = m.posterior_sample


# ------------------------------------------------------------------ without training


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("t", [0.0, 0.3, 0.7, 0.95])
def test_the_inner_velocity_is_that_of_the_posterior(path, t):
    """The posterior of a mixture is a mixture, whose velocity on the linear path is known."""
    m, (x, *u) = three_modes(path), torch.randn(31, 2, generator=rng(), dtype=torch.float64)
    u, rows = torch.stack(u), x.expand(30, 2)
    q, times = posterior(m, x, t), torch.linspace(0, 1, 30, dtype=torch.float64)
    for r in (0.0, 0.2, 0.6, 0.99, 1.0, times):
        assert torch.allclose(glass_velocity(m, u, r, rows, t), q.velocity(u, r), atol=1e-8)
    each = glass_velocity(m, u, times, rows, torch.full((30,), t).double())
    assert torch.allclose(each, q.velocity(u, times), atol=1e-6)  # t in single precision


def test_the_inner_velocity_leads_to_x_at_the_end():
    u, x = torch.randn(2, 5, 2, generator=rng(), dtype=torch.float64)
    t = torch.tensor([0.5, 1, 1, 0.5, 1], dtype=torch.float64)
    b = glass_velocity(three_modes(), u, 0.75, x, t)
    assert torch.allclose(b[t == 1], ((x - u) / 0.25)[t == 1])


@pytest.mark.parametrize(("t", "x"), POINTS)
@pytest.mark.parametrize(
    "sampler",
    [
        Exact(three_modes()),
        Glass(three_modes(), 24),
        Glass(ByVelocity(three_modes(steer.Cosine())), 24),
        WeightedRenoise(three_modes(), candidates=4),
        WeightedRenoise(ByVelocity(three_modes()), candidates=4),
    ],
    ids=["exact", "glass", "glass-cosine", "renoise", "renoise-score"],
)
def test_draws_have_the_posteriors_moments(sampler, t, x):
    """Mean, covariance and E[e^r] within 4 standard errors, themselves at most 3 %."""
    m = three_modes(getattr(getattr(sampler, "flow", None), "path", None))
    error, se, scale = compare(sampler, m, x, t)
    assert ((error / se).abs() < 4).all(), error / se
    assert (se / scale < 0.03).all(), se / scale


def test_two_steps_of_glass_are_seen_to_be_too_few():
    error, se, _ = compare(Glass(three_modes(), 2), three_modes(), POINTS[0][1], 0.3)
    assert ((error / se).abs() > 4).any()


@pytest.mark.parametrize("c", [0.05, 0.5, 20.0])
def test_the_pool_shrinks_with_the_dimension_as_it_says(c):
    """For N(0, c²) at x = 0, ESS/n is (R (2-R))^(d/2), R the posterior's variance over τ²."""
    t, f, d, n = 0.5, 3.0, 4, 40_000
    flow = steer.GaussianMixture(torch.zeros(1, d), c**2)
    pool = WeightedRenoise(flow, f)
    _, log_w = pool.propose(torch.zeros(1, d).double(), t, n, rng())
    share = 1 / (n * log_w[:, 0].softmax(0).square().sum())
    ratio = (f + c**2) / ((f - 1) * (1 + c**2))
    assert float(share) == pytest.approx((ratio * (2 - ratio)) ** (d / 2), rel=0.05)
    if c < 0.1:
        assert float(share) == pytest.approx((math.sqrt(f * (f - 2)) / (f - 1)) ** d, rel=0.06)


def test_re_noising_warns_where_one_look_has_all_the_weight():
    flow = steer.GaussianMixture(torch.zeros(1, 200), 0.01)
    x = torch.randn(3, 200, generator=rng(), dtype=torch.float64)
    with pytest.warns(
        UserWarning, match="3 of 3 rows have fewer than 2 effective candidates of 32"
    ):
        WeightedRenoise(flow).sample(x, 0.3, 1, rng())


# ------------------------------------------------------------------ the map


class Zero(torch.nn.Module):
    """F of `Preconditioned` for N(0, I) data, up to an error."""

    def __init__(self, error=0.0):
        super().__init__()
        self.error = torch.nn.Parameter(torch.tensor(error, dtype=torch.float64))

    def forward(self, u, r, s, x, t):
        return self.error * (u + 1)


def normal_map(path, error=0.0):
    """The posterior map of N(0, I) data in closed form."""
    return PosteriorMap(Preconditioned(Zero(error), path))


def samplers(m):
    return [Glass(m, 4), WeightedRenoise(m), normal_map(m.path), Exact(m)]


@pytest.mark.parametrize("path", PATHS)
def test_the_closed_form_of_normal_data_is_a_posterior_map(path):
    m = steer.GaussianMixture(torch.zeros(1, 2), 1.0, path=path)
    x, u = torch.randn(2, 6, 2, generator=rng(), dtype=torch.float64)
    t = torch.tensor([0, 0.1, 0.4, 0.5, 0.8, 0.97], dtype=torch.float64)
    flow = PosteriorFlow(normal_map(path), x, t)
    for r, s in ((0.0, 1.0), (0.3, 0.6), (0.5, 0.5), (1.0, 1.0)):
        for i in range(6):
            q = posterior(m, x[i], float(t[i]))
            assert torch.allclose(flow.jump(u, r, s)[i], q.jump(u[i : i + 1], r, s)[0])
    for r in (0.0, 0.4, 1.0):
        assert torch.allclose(flow.velocity(u, r), glass_velocity(m, u, r, x, t))
    one, three = (normal_map(path).sample(x, t, 5, rng(), k) for k in (1, 3))
    assert torch.allclose(one, three)


@pytest.mark.parametrize("k", range(4))
def test_one_interface(k):
    """(n, *x.shape), row i for row i and its time; x itself at t = 1; a function of the seed."""
    m = steer.GaussianMixture(torch.zeros(1, 2), 1.0)
    sampler = samplers(m)[k]
    x = torch.tensor([[3.0, 0.0], [0.0, -3.0], [2.0, 2.0]])
    t = torch.tensor([0.9, 0.3, 1.0])
    with torch.no_grad():
        y, again = (sampler.sample(x, t, 500, rng()) for _ in range(2))
        assert sampler.sample(x, 0.5, 7, rng()).shape == (7, 3, 2)
        assert torch.allclose(sampler.sample(x, 1.0, 2, rng()), x.expand(2, 3, 2), atol=1e-6)
    assert y.shape == (500, 3, 2)
    assert y.dtype == torch.float32
    assert torch.equal(y, again)
    assert torch.allclose(y[:, 2], x[2].expand(500, 2), atol=1e-6)
    for i in range(2):
        mean, cov = moments(posterior(m, x[i], float(t[i])))
        sd = cov.diagonal().sqrt()
        assert ((y[:, i].mean(0) - mean).abs() < 5 * sd / 500**0.5).all()
        assert ((y[:, i].std(0) / sd).log().abs() < 0.2).all()


def test_pictures_and_prompts():
    class Named(torch.nn.Module):
        prompts = ()

        def given(self, prompts):
            bound = Named()
            bound.prompts = prompts
            return bound

        def forward(self, u, r, s, x, t):
            assert r.shape == s.shape == t.shape == (len(u),)
            value = torch.tensor([float(p) for p in self.prompts])
            shift = value.repeat_interleave(len(u) // len(value))
            return x - u + shift[:, None, None, None]

    x = torch.zeros(4, 3, 8, 8)
    y = PosteriorMap(Named()).given(["1", "2"]).sample(x, 0.5, 5, rng())
    assert y.shape == (5, 4, 3, 8, 8)
    assert torch.allclose(y[:, :2], torch.tensor(1.0), atol=1e-6)
    assert torch.allclose(y[:, 2:], torch.tensor(2.0), atol=1e-6)
    same = PosteriorMap(Zero())
    assert same.given(["1"]) is same
    wrapped = PosteriorMap(Preconditioned(Named(), steer.Linear())).given(["3"])
    assert wrapped.network.network.prompts == ["3"]


def test_the_gradient_reaches_x():
    """For N(0, I) data a draw is `β x / r² + c z`."""
    x = torch.randn(3, 2, generator=rng(), dtype=torch.float64).requires_grad_()
    y = normal_map(steer.Linear()).sample(x, 0.4, 4, rng())
    (gradient,) = torch.autograd.grad(y.mean(0).sum(), x)
    assert torch.allclose(gradient, torch.full_like(x, 0.4 / (0.6**2 + 0.4**2)))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda s, x: s.sample(x[0], 0.5, 2, rng()), r"states x of shape \(2,\)"),
        (lambda s, x: s.sample(x, torch.rand(4), 2, rng()), r"\(4,\) does not fit 3 rows"),
        (lambda s, x: s.sample(x, torch.rand(3, 1), 2, rng()), "one time per row"),
        (lambda s, x: s.sample(x, 1.5, 2, rng()), r"in \[0, 1\]"),
        (lambda s, x: s.sample(x, torch.tensor(math.nan), 2, rng()), r"in \[0, 1\]"),
        (lambda s, x: s.sample(x, 0.5, 0, rng()), "n must be at least 1"),
    ],
)
def test_what_is_refused(call, words):
    for sampler in samplers(steer.GaussianMixture(torch.zeros(1, 2), 1.0))[:3]:
        with pytest.raises(ValueError, match=words):
            call(sampler, torch.zeros(3, 2))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m, x: PosteriorMap(lambda *a: a[0][:, :1]).sample(x, 0.5, 2, rng()), "returned"),
        (lambda m, x: normal_map(m.path).jump(x[:2], 0, 1, x, 0.5), "one inner state a row"),
        (lambda m, x: normal_map(m.path).jump(x, torch.zeros(2), 1.0, x, 0.5), "fit 3 rows"),
        (lambda m, x: normal_map(m.path).sample(x, 0.5, 2, rng(), 0), "steps must be"),
        (lambda m, x: glass_velocity(m, x[:2], 0.5, x, 0.5), "one inner state a row"),
        (lambda m, x: Glass(m, 1), "steps must be at least 2"),
        (lambda m, x: WeightedRenoise(m, 1.0), "factor - 1 must be above zero"),
        (lambda m, x: WeightedRenoise(m, candidates=0), "candidates must be at least 1"),
        (lambda m, x: PosteriorObjective(m.path, rule=LMD()), "LMD follows a teacher"),
        (lambda m, x: PosteriorObjective(m.path, prior=1.5), "prior must be in"),
        (lambda m, x: PosteriorObjective(m.path, diagonal=-1), "diagonal must be in"),
        (lambda m, x: PosteriorObjective(m.path, pairs="trangle"), "triangle"),
        (lambda m, x: descend(normal_map(m.path), m, x[:1]), "1 rows"),
    ],
)
def test_what_is_refused_by_one(call, words):
    with pytest.raises(ValueError, match=words):
        call(steer.GaussianMixture(torch.zeros(1, 2), 1.0), torch.zeros(3, 2))


# ------------------------------------------------------------------ training


def descend(flow, m, x_1, seed=0, **options):
    return PosteriorObjective(m.path, **options)(flow, flow, x_1, [], rng(seed))


@pytest.mark.parametrize(
    "rule", [PSD(), PSD(midpoint=False), Heun(), LMD()], ids=["psd-m", "psd-u", "heun", "lmd"]
)
def test_by_glass_the_loss_is_zero_at_the_exact_map_alone(rule):
    m = steer.GaussianMixture(torch.zeros(1, 2), 1.0)
    x_1 = m.sample(2000, rng()).double()
    right, wrong = (
        descend(normal_map(m.path, e), m, x_1, teacher=m, rule=rule) for e in (0.0, 0.1)
    )
    assert right["diagonal"] < 1e-10
    assert right["off"] < (1e-4 if isinstance(rule, Heun) else 1e-10)  # Heun's local error
    assert wrong["diagonal"] > 1e-3
    assert wrong["off"] > 30 * right["off"]


@pytest.mark.parametrize("rule", [None, LSD(), Heun().follows("own")], ids=["psd", "lsd", "heun"])
def test_from_data_the_mean_gradient_is_zero_at_the_exact_map_alone(rule):
    """Within 4 standard errors there, beyond 10 of them off it; over 50 batches."""
    m = steer.GaussianMixture(torch.zeros(1, 2), 1.0)
    for error in (0.0, 0.5):
        flow, gradients = normal_map(m.path, error), []
        for seed in range(50):
            loss = descend(flow, m, m.sample(500, rng(seed)).double(), seed, rule=rule)["loss"]
            gradients.append(torch.autograd.grad(loss, flow.parameters())[0])
        g = torch.stack(gradients)
        off = float((g.mean() / (g.std() / 50**0.5)).abs())
        assert off < 4 if error == 0 else off > 10, off


def test_a_step_is_a_function_of_its_generator_and_trains_the_map_only():
    m = three_modes()
    flow, average = (PosteriorMap(PosteriorMLP(2, 16, 1)) for _ in range(2))
    teacher = Glassy(m)
    objective = PosteriorObjective(m.path, teacher, LMD())
    x_1 = m.sample(20, rng())
    losses = [objective(flow, average, x_1, [], rng(seed))["loss"] for seed in (5, 5, 6)]
    assert losses[0] == losses[1] != losses[2]
    losses[0].backward()
    assert all(p.grad is not None for p in flow.parameters())
    assert all(p.grad is None for p in (*average.parameters(), *teacher.parameters()))
    assert not list(objective.parameters())


class Glassy(ByVelocity):
    """A mixture with a parameter."""

    def __init__(self, exact):
        super().__init__(exact)
        self.one = torch.nn.Parameter(torch.ones(()))

    def velocity(self, x, t):
        return self.one * super().velocity(x, t)


def trained(m, steps, batch, decay, width=96, **options):
    """A posterior map of an MLP's, by Muon with a cosine to zero: its running average."""
    torch.manual_seed(0)
    flow = PosteriorMap(Preconditioned(PosteriorMLP(2, width), m.path))
    average = copy.deepcopy(flow).requires_grad_(False)
    objective, generator = PosteriorObjective(m.path, **options), rng(1)
    optimizer = MuonAdamW(flow.parameters(), 2e-2, 5e-3)
    schedule = warm_cosine(optimizer, steps)["scheduler"]
    for k in range(steps):
        optimizer.zero_grad()
        x_1 = m.sample(batch, generator)
        objective(flow, average, x_1, [], generator, k / steps)["loss"].backward()
        optimizer.step()
        schedule.step()
        follow(average.parameters(), flow.parameters(), decay, k + 1)
    return average


def check(flow, m, errors=None):
    """Off by at most 5 % of the prior's scale; and so many standard errors of exact draws."""
    cov = moments(m)[1]
    for t, x in POINTS:
        error, _, own = compare(flow, m, x, t)
        se, prior = compare(Exact(m), m, x, t)[1], scales(cov, own[-1:])  # E[e^r] is its own
        print(f"t {t}: error / prior's scale", (error / prior).numpy().round(3))
        print(f"t {t}: error / posterior's scale", (error / own).numpy().round(3))
        assert (se / own < 0.03).all(), se / own
        assert ((error / prior).abs() < 0.05).all(), error / prior
        assert errors is None or ((error / se).abs() < errors).all(), error / se


def test_a_map_learned_by_glass_draws_the_posterior():
    m = three_modes()
    check(trained(m, 700, 768, 0.99, teacher=m, diagonal=0.3), m)


def test_an_untrained_map_is_far_off():
    m, cov = three_modes(), moments(three_modes())[1]
    plain = PosteriorMap(Preconditioned(lambda u, *_: torch.zeros_like(u), m.path))
    for t, x in POINTS:
        error, _, own = compare(plain, m, x, t)
        assert (error / scales(cov, own[-1:])).abs().max() > 0.3


@pytest.mark.slow
def test_a_map_learned_longer_by_glass_is_within_four_standard_errors():
    m = three_modes()
    check(trained(m, 2500, 1024, 0.995, teacher=m, diagonal=0.3), m, 4)


@pytest.mark.slow
def test_a_map_learned_from_data_draws_the_posterior():
    m = three_modes()
    check(trained(m, 3000, 2048, 0.998, 128, diagonal=0.75), m)


@pytest.mark.slow
def test_a_map_learned_longer_from_data_is_within_four_standard_errors():
    """Eight minutes of one core: the velocity of single pairs is a noisy target."""
    m = three_modes()
    check(trained(m, 10_000, 4096, 0.9995, 128, diagonal=0.75), m, 4)
