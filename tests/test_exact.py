import math

import pytest
import torch
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

import steer
from steer.path import as_time
from tests.test_flow import mixture


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def torch_mixture(m, t):
    """The law at time t by torch.distributions."""
    alpha, beta = (float(c) for c in m.path(t))
    eye = torch.eye(m.means.shape[1], dtype=torch.float64)
    parts = MultivariateNormal(beta * m.means, alpha**2 * eye + beta**2 * m.covariances)
    return MixtureSameFamily(Categorical(m.weights), parts)


@pytest.mark.parametrize("t", [0.0, 0.4, 1.0])
def test_log_prob_and_score(t):
    m = mixture()
    x = torch.randn(7, 3, generator=rng(), dtype=torch.float64).requires_grad_()
    expected = torch_mixture(m, t).log_prob(x)
    assert torch.allclose(m.log_prob(x, t), expected)
    (score,) = torch.autograd.grad(expected.sum(), x)
    assert torch.allclose(m.score(x, t), score)


@pytest.mark.parametrize("full", [True, False])
def test_a_time_for_each_row(full):
    """Every row is what it is with its own time for all."""
    m, x = mixture(full=full), torch.randn(5, 3, generator=rng(), dtype=torch.float64)
    s, t = torch.tensor([[0.0, 0.2, 0.5, 0.9, 0.3], [1.0, 0.6, 0.7, 0.9, 1.0]]).double()
    for name, times in {
        "log_prob": (s,), "score": (s,), "velocity": (s,), "denoise": (s,), "jump": (s, t),
    }.items():  # fmt: skip
        f = getattr(m, name)
        alone = [f(x[i : i + 1], *(float(u[i]) for u in times)) for i in range(5)]
        assert torch.allclose(f(x, *times), torch.cat(alone), atol=2e-5), name


def test_one_gaussian_in_closed_form():
    """`X(s,t,x) = beta_t m + sqrt(C_t / C_s) (x - beta_s m)` in the covariance's eigenbasis."""
    a = torch.randn(3, 3, generator=rng(), dtype=torch.float64)
    cov, mean = a @ a.T + 0.2 * torch.eye(3), torch.tensor([[1.0, -2.0, 0.5]]).double()
    m = steer.GaussianMixture(mean, cov[None])
    values, basis = torch.linalg.eigh(cov)
    x, s, t = torch.randn(9, 3, generator=rng(1), dtype=torch.float64), 0.2, 0.9
    scale = (((1 - t) ** 2 + t**2 * values) / ((1 - s) ** 2 + s**2 * values)).sqrt()
    expected = t * mean + ((x - s * mean) @ basis * scale) @ basis.T
    assert float((m.jump(x, s, t) - expected).abs().max()) < 1e-4


@pytest.mark.parametrize("path", [steer.Linear(), steer.Cosine(), steer.VariancePreserving()])
def test_jump_is_the_monotone_map_in_one_dimension(path):
    """`X(t,1) = F_1^-1 ∘ F_t`: so F_1(X(t,1,x)) = F_t(x)."""
    m = steer.GaussianMixture(
        torch.tensor([[-2.0], [0.5], [2.0]]), 0.25, torch.tensor([0.4, 0.35, 0.25]), path
    )

    def cdf(x, t):
        alpha, beta = (float(c) for c in path(t))
        sd = math.sqrt(alpha**2 + 0.25 * beta**2)
        z = (x - beta * m.means[:, 0]) / sd / math.sqrt(2)
        return (m.weights * (1 + torch.erf(z)) / 2).sum(-1, keepdim=True)

    x = torch.randn(4000, 1, generator=rng(), dtype=torch.float64)
    for t in (0.0, 0.5):
        at = float(path(t)[0] ** 2 + path(t)[1] ** 2) ** 0.5 * x
        y = m.lookahead(at, t)
        density = m.log_prob(y, 1.0).exp()[:, None]
        error = (cdf(y, 1.0) - cdf(at, t)).abs() / density.clamp(min=1e-3)
        assert float(error.max()) < 1e-4


@pytest.mark.parametrize("d", [2, 16])
def test_jump_is_as_accurate_as_it_says(d):
    m = mixture(d=d)
    x = torch.randn(1500, d, generator=rng(5), dtype=torch.float64)
    fine = m._integrate(x, as_time(0.0), as_time(1.0), 400)
    assert float((m.jump(x, 0.0, 1.0) - fine).abs().max()) < 1e-4
    single = m.jump(x.float(), 0.0, 1.0)
    assert single.dtype == torch.float32
    assert float((single - fine).abs().quantile(0.999)) < 1e-4  # rounding grows where paths part


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")
@pytest.mark.parametrize("path", [steer.Linear(), steer.Cosine(), steer.VariancePreserving()])
def test_the_derivative_of_no_jump_is_the_velocity(path):
    """`∂_t X(s,t,x) = b_s(x)` at t = s, and `∂_s X = -b_s(x)` there."""
    m, s = mixture(path), torch.tensor(0.3, dtype=torch.float64)
    x = torch.randn(5, 3, generator=rng(4), dtype=torch.float64)
    one, b = torch.ones_like(s), m.velocity(x, 0.3)
    for f, sign in ((lambda t: m.jump(x, s, t), 1), (lambda t: m.jump(x, t, s), -1)):
        y, rate = torch.autograd.functional.jvp(f, s, one)
        assert torch.allclose(y, x)
        assert torch.allclose(rate, sign * b)


def test_push_forward_moments():
    """Noise pushed to t = 1 has the data's moments, within 4 standard errors."""
    m, n = mixture(), 20_000
    x = m.jump(torch.randn(n, 3, generator=rng(2)), 0.0, 1.0)
    mean = (m.weights[:, None] * m.means).sum(0)
    error = (x.mean(0) - mean).abs() / (x.std(0) / n**0.5)
    assert float(error.max()) < 4
    drawn = m.sample(n, rng(3))
    error = (x.var(0) / drawn.var(0)).log().abs() / (2 * 2 / n) ** 0.5
    assert float(error.max()) < 5  # the fourth moments of a mixture are not a Gaussian's
    assert drawn.dtype == torch.get_default_dtype()


def test_posterior_sample():
    """Bayes: its mean is the denoiser, its scatter the denoiser's Jacobian times alpha²/beta."""
    m, t, n = mixture(), 0.4, 40_000
    x = torch.randn(2, 3, generator=rng(4), dtype=torch.float64)
    draws = m.posterior_sample(x, t, n, rng(5))
    assert draws.shape == (n, 2, 3)
    error = (draws.mean(0) - m.denoise(x, t)).abs() / (draws.std(0) / n**0.5)
    assert float(error.max()) < 4
    jacobian = torch.func.vmap(torch.func.jacrev(lambda row: m.denoise(row[None], t)[0]))(x)
    for i in range(2):
        cov = torch.cov(draws[:, i].T)
        expected = (1 - t) ** 2 / t * jacobian[i]
        assert torch.allclose(cov, expected, atol=0.05 * float(cov.diagonal().max()))


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize(
    "reward",
    [
        steer.LinearReward(torch.tensor([0.6, -0.3, 0.2])),
        steer.QuadraticReward(
            torch.tensor([0.5, 0.0, 1.0]), torch.diag(torch.tensor([1, 2, 0.0]))
        ),
    ],
    ids=["linear", "quadratic, singular"],
)
def test_tilt_is_p_times_exp_reward_over_z(reward, temperature):
    """log q = log p + R - log Z, everywhere: this pins weights, means and covariances at once."""
    m = mixture()
    q, log_z = m.tilt(reward, temperature)
    x = 2 * torch.randn(50, 3, generator=rng(), dtype=torch.float64)
    assert torch.allclose(q.log_prob(x), m.log_prob(x) + reward(x) / temperature - log_z)


def test_tilt_of_another_reward():
    with pytest.raises(TypeError, match="LinearReward"):
        mixture().tilt(steer.reward.wrap(lambda x: x[:, 0]))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((torch.zeros(3), 1.0), r"give \(k, d\)"),
        ((torch.zeros(3, 2), torch.ones(2)), r"\(3,\) variances"),
        ((torch.zeros(3, 2), 1.0, torch.ones(2)), "give 3 of them"),
        ((torch.zeros(3, 2), 1.0, torch.tensor([1.0, -1, 1])), "none below zero"),
        ((torch.zeros(1, 2), -1.0), "positive definite"),
    ],
)
def test_bad_mixtures(arguments, words):
    with pytest.raises(ValueError, match=words):
        steer.GaussianMixture(*arguments)
