"""Methods of the table against closed forms: what claims the tilt has it, the rest its rule."""

import itertools
import math

import pytest
import torch

import steer
from steer.flow import Wrapped
from steer.guidance import noise_space
from steer.guidance.noise_space import NoiseSMC, elliptical, langevin, neal
from steer.guidance.posterior import PosteriorValue
from steer.guidance.potential import Lookahead
from steer.guidance.tempering import next_inverse
from steer.guidance.tfg import doob
from steer.path import step_times
from steer.reward import wrap
from steer.sampling.forecast import plan as planned
from steer.sampling.methods import TABLE
from tests.test_oracle import problem

slow = pytest.mark.slow

# method, options -> particles in all, bound on the standard error of Z
EXACT = {
    "noise-smc": ({}, 8_192, 0.03),
    "noise-smc, pcn": ({"move": "pcn", "moves": 2}, 8_192, 0.03),
    "noise-smc, slice": ({"move": "slice"}, 8_192, 0.03),
    "noise-smc, entropy": ({"bound": "entropy"}, 8_192, 0.03),
    "renoise": ({}, 16_384, 0.06),
    "posterior": ({"by": "glass", "inner": 4, "draws": 8}, 8_192, 0.06),
    "posterior, through": (
        {"by": "glass", "inner": 4, "draws": 8, "gradient": "through"}, 8_192, 0.06,
    ),
    "tds": ({}, 16_384, 0.06),
    "das": ({}, 16_384, 0.06),
    "fk": ({}, 32_768, 0.08),
    "fk-difference": ({}, 32_768, 0.08),
    "fk-sum": ({}, 32_768, 0.08),
    "split, least": ({"least": 0.7}, 8_192, 0.03),
}  # fmt: skip
WEAK = {"fk": 8.0, "fk-sum": 40.0}
"""Temperatures are raised by this: their weights degenerate where the tilt is strong."""

QUICK = ["noise-smc", "noise-smc, slice", "renoise", "posterior", "fk", "fk-sum"]
SPREAD = {
    "posterior",
    "posterior, through",
    "fk",
    "fk-sum",
    "fk-difference",
    "tds",
}
"""Unbiased too, but with tails that 256 particles do not see: at 10 steps and d = 2 alone."""

CASES = [
    pytest.param(name, 2, "linear", 10, id=name, marks=() if name in QUICK else slow)
    for name in EXACT
] + [
    pytest.param(name, d, kind, steps, id=f"{name}, {kind}, d={d}, {steps} steps", marks=slow)
    for name in EXACT
    if name not in SPREAD
    for kind in ("linear", "quadratic")
    for d, steps in ((2, 25), (16, 10), (16, 25))
]


def built(name, flow, reward, temperature, steps, **options):
    """The sampler of a method, on equal steps."""
    times = step_times(steps)
    return TABLE[name].build(flow, reward, None, temperature, times, **options)


def last(sampler, x, **options):
    *_, population = sampler.steps(x, **options)
    return population


@pytest.mark.parametrize(("case", "d", "kind", "steps"), CASES)
def test_what_claims_the_tilt_has_its_evidence_and_its_means(case, d, kind, steps):
    options, total, bound = EXACT[case]
    name, runs = case.split(",")[0], 32
    flow, reward, temperature = problem(d, kind)
    temperature *= WEAK.get(name, 1.0)
    tilt, log_z = flow.tilt(reward, temperature)
    x = torch.randn(runs, total // runs, d, generator=torch.Generator().manual_seed(steps))
    end = last(built(name, flow, reward, temperature, steps, **options), x, seed=1)
    ratio = (end.log_z.double() - log_z).exp()
    error = float(ratio.std()) / runs**0.5
    assert error <= bound
    # an adaptive choice of g is biased by O(1/n), n = 256 or more
    assert abs(float(ratio.mean()) - 1) < 4 * error + 0.005
    mean = (end.log_w.softmax(-1)[..., None] * end.x).sum(1).double()
    off = ratio[:, None] * (mean - (tilt.weights[:, None] * tilt.means).sum(0))
    spread = off.std(0) / runs**0.5
    assert (off.mean(0).abs() < 5 * spread + 0.005).all()


class Wrong(Wrapped):
    """A map that is far from that of its velocity."""

    def call(self, name, x, *times):
        y = super().call(name, x, *times)
        return y + 0.6 * torch.sin(3 * x) if name == "jump" else y


def test_noise_smc_is_exact_for_a_wrong_map():
    """Against 10^6 draws of the map's own push-forward, weighted."""
    flow, reward, temperature = problem(2, "linear")
    wrong = Wrong(flow)
    g = torch.Generator().manual_seed(3)
    parts = torch.randn(1_000_000, 2, generator=g).split(250_000)
    y = torch.cat([wrong.jump(x, 0.0, 1.0) for x in parts])
    weights = (reward(y, None).double() / temperature).exp()
    log_z = weights.mean().log()
    mean = (weights[:, None] * y).mean(0) / weights.mean()
    x = torch.randn(32, 256, 2, generator=g)
    end = last(built("noise-smc", wrong, reward, temperature, 12, moves=2), x, seed=2)
    ratio = (end.log_z.double() - log_z).exp()
    error = float(ratio.std()) / 32**0.5
    assert error < 0.03
    assert abs(float(ratio.mean()) - 1) < 4 * error + 0.01  # the push-forward has an error, too
    means = (end.log_w.softmax(-1)[..., None] * end.x).sum(1).double()
    spread = means.std(0) / 32**0.5
    assert ((means.mean(0) - mean).abs() < 4 * spread + 0.02).all()
    # the exact flow's tilt is another law
    exact = flow.tilt(reward, temperature)[0]
    assert ((exact.weights[:, None] * exact.means).sum(0) - mean).abs().max() > 0.1


@slow
def test_noise_smc_crosses_between_modes_of_very_unequal_mass():
    """Two modes at 1 : 1000, the small one rewarded: plain importance sampling has ESS < .1 %."""
    flow = steer.GaussianMixture(
        torch.tensor([[-3.0, 0.0], [3.0, 0.0]]), 0.3, torch.tensor([0.999, 0.001])
    )
    reward, temperature = steer.LinearReward(torch.tensor([1.0, 0.0])), 0.5
    tilt, log_z = flow.tilt(reward, temperature)
    twice = float(flow.tilt(reward, temperature / 2)[1])
    assert math.exp(2 * float(log_z) - twice) < 0.001
    x = torch.randn(16, 1024, 2, generator=torch.Generator().manual_seed(0))
    end = last(built("noise-smc", flow, reward, temperature, 50, fresh=0.3), x, seed=0)
    ratio = (end.log_z.double() - log_z).exp()
    error = float(ratio.std()) / 4
    assert abs(float(ratio.mean()) - 1) < 4 * error + 0.02
    assert error < 0.25  # about one of 1,024 particles begins in the small mode
    right = (end.log_w.softmax(-1) * (end.x[..., 0] > 0)).sum(1)
    assert abs(float(right.mean()) - float(tilt.weights[1])) < 0.05


@pytest.mark.parametrize("move", ["langevin", "pcn", "slice"])
def test_a_move_leaves_the_law_as_it_is(move):
    """Exact draws of N exp(g R) stay exact draws, in a case that is normal again."""
    d, n = 2, 60_000
    flow = steer.GaussianMixture(torch.zeros(1, d), 1.0)  # its map is the identity
    reward = steer.LinearReward(torch.tensor([1.0, -0.5]))
    mean = torch.tensor([1.0, -0.5])
    x = mean + torch.randn(1, n, d, generator=torch.Generator().manual_seed(0))
    view = Lookahead(flow, reward, ramp=torch.ones_like)
    smc = NoiseSMC(flow, view, 6, move=move, fresh=0.2)
    state = noise_space._Run(smc, x, 0, 0)
    state.g = torch.ones_like(state.g)
    with torch.no_grad():
        for k in range(4):
            noise = state.noise.at(k)
            state.here = (state._slice if move == "slice" else state._propose)(noise)
    y = state.here.x
    moved = ((y - x[0]).abs().sum(1) > 0).float().mean()
    assert moved > 0.85
    assert torch.allclose(y.mean(0), mean, atol=4 / n**0.5)
    assert torch.allclose(y.T.cov(), torch.eye(2), atol=6 / n**0.5)


def test_the_proposals_are_their_rules():
    x, z, slope = torch.randn(3, 5, 2, generator=torch.Generator().manual_seed(0))
    share = torch.full((5,), 0.6)
    assert torch.allclose(neal(x, share, z), 0.8 * x + 0.6 * z)
    assert torch.allclose(langevin(x, share, z, slope), 0.8 * x + 0.2 * slope + 0.6 * z)
    turn = torch.full((5,), 0.3)
    assert torch.allclose(elliptical(x, z, turn), math.cos(0.3) * x + math.sin(0.3) * z)


@pytest.mark.parametrize("bound", ["ess", "entropy"])
def test_the_next_temperature_meets_its_bound(bound):
    g = torch.Generator().manual_seed(0)
    slope = torch.randn(3, 400, generator=g) * torch.tensor([[0.01], [3.0], [50.0]])
    zero = torch.zeros(3)
    found = next_inverse(torch.zeros(3, 400), slope, zero, 0.5, bound)
    assert found[0] == 1  # so flat that the whole way is allowed
    share = (found[:, None] * slope.double()).softmax(1)
    if bound == "ess":
        kept = 1 / share.square().sum(1) / 400
    else:
        kept = (-(share * (share * 400).log()).sum(1)).exp()
    assert torch.allclose(kept[1:], torch.tensor(0.5).double(), atol=1e-4)
    assert (found[1:] < 1).all()


# ---- what has no law has its rule

A = torch.tensor([0.8, -0.5])


def curved(x):
    return torch.tanh(x) @ A + 0.1 * x.square().sum(1)


def mixture():
    return problem(2, "linear")[0]


def start(n=6):
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(5))


def slope_at(flow, x, s, view, reward=curved):
    x = x.clone().requires_grad_()
    clean = flow.denoise(x, s) if view == "denoiser" else flow.jump(x, s, 1.0)
    return clean.detach(), torch.autograd.grad(reward(clean).sum(), x)[0]


def end_of(name, x, steps, temperature=0.7, **options):
    return last(built(name, mixture(), wrap(curved), temperature, steps, **options), x)


def test_the_tilt_s_coefficient():
    for path in (steer.Linear(), steer.Cosine()):
        flow = steer.GaussianMixture(torch.tensor([[0.5, -1.0]]), 0.5, path=path)
        reward = steer.LinearReward(A)
        tilt = flow.tilt(reward)[0]
        x, t = start(), 0.4
        gradient = tilt.score(x, t) - flow.score(x, t)
        moved = flow.velocity(x, t) + doob(path, t) * gradient
        assert torch.allclose(tilt.velocity(x, t), moved, atol=1e-4)
    assert doob(steer.Linear(), 0.25) == pytest.approx(3.0)


@pytest.mark.parametrize("name", ["dps", "damped"])
def test_dps_and_damped_are_their_rules(name):
    flow, x, times, rho = mixture(), start(), step_times(4), 0.6
    done = end_of(name, x, 4, rho=rho)
    for s, t in itertools.pairwise(times):
        _, g = slope_at(flow, x, s, "denoiser")
        push = rho * min((t - s) * ((1 - s) / s if s else math.inf), 1.0) * g / 0.7
        if name == "damped":
            push = push / (1 + 2 * rho / 0.7 * (1 - s) ** 2 / ((1 - s) ** 2 + s**2))
        x = flow.jump(x, s, t) + push
    assert torch.allclose(done.x, x, atol=1e-4)
    assert torch.allclose(done.reward, curved(x), atol=1e-4)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 3.0])
def test_damping_makes_the_plug_in_exact_on_a_gaussian(temperature):
    """Of N(0, I) and `-|x - 2|²`, at any temperature, one per prompt too (2606.02884)."""
    flow = steer.GaussianMixture(torch.zeros(1, 1), 1.0)
    x = torch.randn(2, 2048, 1, generator=torch.Generator().manual_seed(0))
    reward = wrap(lambda y: -(y[:, 0] - 2).square())
    precision = 1 + 2 / temperature
    for t in (temperature, torch.full((2,), temperature)):
        end = last(built("damped", flow, reward, t, 64), x).x
        assert float(end.mean()) == pytest.approx(4 / temperature / precision, abs=0.06)
        assert float(end.std()) == pytest.approx(precision**-0.5, rel=0.05)
        plug = last(built("dps", flow, reward, t, 64), x).x  # without it: too far
        assert abs(float(plug.mean()) - 4 / temperature / precision) > 0.09


def test_mpgd_and_fmrg_e_are_their_rules():
    flow = mixture()
    for name, options in (("mpgd", {"mu": 0.2, "inner": 2}), ("fmrg-e", {"mu": 2.0, "inner": 3})):
        x = start()
        done = end_of(name, x, 3, 0.7 if name == "mpgd" else 1.0, **options)
        for s, t in itertools.pairwise(step_times(3)):
            first, _ = slope_at(flow, x, s, "denoiser" if name == "mpgd" else "lookahead")
            y = flow.jump(x, s, t)
            speed = (y - x).norm(dim=1, keepdim=True) / (t - s)
            clean = first
            for _ in range(options["inner"]):
                leaf = clean.clone().requires_grad_()
                g = torch.autograd.grad(curved(leaf).sum(), leaf)[0]
                if name == "mpgd":
                    clean = clean + 0.2 * g / 0.7
                else:
                    clean = clean + 2.0 / 3 * speed * g / g.norm(dim=1, keepdim=True)
            x = y + t * (1 if name == "mpgd" else 1 - s) * (clean - first)
        assert torch.allclose(done.x, x, atol=1e-4)


def test_lgd_mc_averages_blurred_views_and_without_blur_is_dps():
    x = start()
    plain, none = end_of("dps", x, 4), end_of("lgd-mc", x, 4, smooth=0.0)
    assert torch.equal(plain.x, none.x)
    blurred = end_of("lgd-mc", x, 4, smooth=0.5, draws=8)
    assert not torch.allclose(plain.x, blurred.x, atol=1e-3)
    # of a linear reward the mean over symmetric draws is a constant: nothing changes but that
    reward = steer.LinearReward(A)
    flow = mixture()
    a = last(built("dps", flow, reward, 1.0, 4), x)
    b = last(built("lgd-mc", flow, reward, 1.0, 4, smooth=0.5, draws=2), x)
    assert torch.allclose(a.x, b.x, atol=1e-4)


def test_recurrence_makes_a_step_again_from_its_own_start():
    x = start()
    once, twice = end_of("freedom", x, 3, recur=1), end_of("freedom", x, 3, recur=3)
    assert torch.equal(once.x, end_of("dps", x, 3).x)
    assert float(twice.reward.mean()) > float(once.reward.mean())  # pushed three times a step
    flow = mixture()  # without a push, recurrence keeps the law
    g = torch.Generator().manual_seed(0)
    x = torch.randn(20_000, 2, generator=g)
    end = last(built("freedom", flow, wrap(curved), 1.0, 3, rho=0.0, recur=2), x)
    exact = flow.sample(20_000, g)
    assert torch.allclose(end.x.mean(0), exact.float().mean(0), atol=0.04)
    assert torch.allclose(end.x.T.cov(), exact.float().T.cov(), atol=0.06)


def test_ugd_is_freedom_and_mpgd_at_once():
    x = start()
    assert torch.equal(end_of("ugd", x, 3, mu=0.0).x, end_of("freedom", x, 3).x)
    both = end_of("ugd", x, 1, recur=1, rho=0.5, mu=0.2).x
    apart = [end_of("dps", x, 1, rho=0.5).x, end_of("mpgd", x, 1, mu=0.2).x]
    plain = mixture().jump(x, 0.0, 1.0)
    assert torch.allclose(both - plain, sum(y - plain for y in apart), atol=1e-5)


def test_tfg_is_the_others_by_its_numbers():
    x = start()
    assert torch.equal(end_of("tfg", x, 3).x, end_of("dps", x, 3).x)
    kin = {"rho": 0.5, "mu": 0.1, "recur": 2}
    assert torch.equal(end_of("tfg", x, 3, **kin).x, end_of("ugd", x, 3, **kin).x)


@pytest.mark.parametrize("name", ["svdd", "tree", "beam", "rounds"])
def test_a_search_finds_more_than_best_of_n_and_only_what_it_looked_at(name):
    x = torch.randn(8, 16, 2, generator=torch.Generator().manual_seed(0))
    options = {} if name == "rounds" else {"candidates": 4}
    searched = end_of(name, x, 6, 0.2, **options)
    plain = end_of("best-of-n", x, 6)
    assert float(searched.reward.max(1).values.mean()) > float(plain.reward.max(1).values.mean())
    assert torch.allclose(
        searched.reward, curved(searched.x.flatten(0, 1)).reshape(8, 16), atol=1e-4
    )
    if name in ("beam", "rounds"):  # few ancestors are left
        left = [len(set(row.tolist())) for row in searched.ancestors]
        assert max(left) < 16


def test_svdd_draws_by_the_tilt_of_its_candidates():
    """One step from data to data: candidates of one particle, weighed by softmax(R)."""
    flow = steer.GaussianMixture(torch.zeros(1, 2), 1.0)
    reward = steer.LinearReward(torch.tensor([1.0, 0.0]))
    x = torch.zeros(40_000, 2)
    chosen = next(iter(built("svdd", flow, reward, 0.5, 2, candidates=64).steps(x))).x
    # x_.5 = .5 y + .5 z around its mean, y(0) = 0 for all: the candidates are N(0, .25)
    base = torch.randn(40_000, 64, generator=torch.Generator().manual_seed(0)) * 0.5
    view = flow.jump(torch.stack([base.flatten(), base.flatten() * 0], 1), 0.5, 1.0)[:, 0]
    share = (view.reshape(base.shape) / 0.5).softmax(1)
    assert abs(float(chosen[:, 0].mean()) - float((share * base).sum(1).mean())) < 0.02


def test_fk_weighs_by_what_a_path_has_seen():
    """Without resampling all three weigh by the end's reward; before it by their own rule."""
    flow, x, steps = mixture(), start(64), 4
    for name in ("fk", "fk-difference", "fk-sum"):
        seen, populations = [], []
        for p in built(name, flow, wrap(curved), 0.5, steps, threshold=0.0).steps(x, seed=3):
            seen.append(p.reward / 0.5)
            populations.append(p.log_w)
        assert torch.allclose(populations[-1], seen[-1], atol=1e-4)
        r = torch.stack(seen[:-1])
        rule = {
            "fk": r.cummax(0).values.cumsum(0),
            "fk-difference": r,
            "fk-sum": r.cumsum(0).cumsum(0),
        }[name]
        assert torch.allclose(torch.stack(populations[:-1]), rule, atol=1e-4)


def test_das_climbs_its_ramp_and_tds_has_none():
    flow, x = mixture(), start(64)
    first = {}
    for name in ("das", "tds"):
        sampler = built(name, flow, wrap(curved), 0.5, 4, threshold=0.0)
        first[name] = float(sampler.potential._ramp(torch.tensor(0.25))[0])
        assert sampler.scale == 2.0
        last(sampler, x)
    assert first["tds"] == 1
    assert first["das"] == pytest.approx((1.008**25 - 1) / (1.008**100 - 1), abs=1e-4)


def test_the_posterior_s_two_gradients_agree():
    """Both estimate ∇V: by many draws they meet its closed form."""
    flow, reward, temperature = problem(2, "linear")
    tilt = flow.tilt(reward, temperature)[0]
    x, t = start(4), 0.6
    exact = tilt.score(x, t) - flow.score(x, t)
    for gradient, least in (("covariance", 0.12), ("through", 0.12)):
        value = PosteriorValue(
            flow, reward, None, temperature, steer.Glass(flow, 24), 4000, gradient
        )
        assert (value.gradient(x, t)[1] - exact).abs().max() < least


def test_the_posterior_needs_no_gradient_of_the_reward():
    flow, x = mixture(), start(128)
    black_box = wrap(lambda y: (y[:, 0] > 0).float(), differentiable=False)
    done = last(built("posterior", flow, black_box, 0.2, 8, by="glass"), x)
    plain = last(built("none", flow, black_box, 0.2, 8), x)
    assert float(done.reward.mean()) > float(plain.reward.mean()) + 0.2


@pytest.mark.parametrize("name", ["fmrg-j", "dps", "svdd"])
def test_the_best_lookahead_can_be_kept_at_no_further_cost(name):
    x = torch.randn(4, 8, 2, generator=torch.Generator().manual_seed(0))
    temperature = 1.0 if name == "fmrg-j" else 0.5
    flow = mixture()
    *seen, end = built(name, flow, wrap(curved), temperature, 6, keep_best=True).steps(x, seed=1)
    *_, plain = built(name, flow, wrap(curved), temperature, 6).steps(x, seed=1)
    looks = torch.stack([p.reward for p in seen if p.time < 1] + [plain.reward])
    assert torch.allclose(end.reward, looks.max(0).values, atol=1e-5)
    assert torch.allclose(curved(end.x.flatten(0, 1)).reshape(4, 8), end.reward, atol=1e-4)
    options = {"keep_best": True}
    assert planned(name, 6, **options) == planned(name, 6)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("noise-smc", {"move": "hop"}, "move"),
        ("noise-smc", {"least": 1.0}, "least"),
        ("noise-smc", {"threshold": 0.4}, "threshold=0.4 is below least=0.5"),
        ("noise-smc", {"threshold": [0.5]}, r"threshold must be a number, got \[0.5\]"),
        ("noise-smc", {"jumps": 1.5}, "number of jumps must be a whole number"),
        ("split", {"least": 0.0}, "least must be between 0 and 1"),
        ("fmrg-j", {"scale": "abc"}, "scale must be a number, got 'abc'"),
        ("noise-smc", {"bound": "mean"}, "bound"),
        ("posterior", {"by": "map"}, "no posterior map"),
        ("posterior", {"by": "magic"}, "sampler of the posterior"),
        ("posterior", {"gradient": "up"}, "gradient"),
        ("fk", {"view": "ahead"}, "view"),
        ("svdd", {"candidates": 0}, "candidates"),
        ("dps", {"rho": -1.0}, "rho"),
        ("damped", {"damp": 0.0}, "damp"),
        ("lgd-mc", {"smooth": -0.1}, "smoothing"),
        ("beam", {"width": 0}, "width"),
        ("tree", {"noise": -1.0}, "noise"),
    ],
)
def test_numbers_are_checked_at_the_door(name, options, words):
    with pytest.raises(ValueError, match=words):
        built(name, mixture(), wrap(curved), 1.0, 4, **options)


@pytest.mark.parametrize("name", ["fk", "fk-sum", "fk-difference", "renoise", "das", "noise-smc"])
def test_a_run_that_a_budget_ends_has_the_whole_evidence(name):
    """The last jump is weighed by the method's own rule, whatever that has seen before."""
    flow, reward = problem(2, "linear")[:2]
    log_z = float(flow.tilt(reward, 4.0)[1])
    options = {"particles": 4096, "steps": 8, "method": name, "temperature": 4.0}
    whole = steer.sample(flow, reward, None, **options)
    cut = steer.sample(flow, reward, None, budget=0.6 * whole.nfe, **options)
    assert cut.nfe < whole.nfe
    assert float(cut.log_z) == pytest.approx(log_z, abs=0.15)


def test_every_candidate_is_there_at_the_end_of_a_search():
    for name, options in (("rounds", {}), ("beam", {"width": 2})):
        *_, end = built(name, mixture(), wrap(curved), 1.0, 4, **options).steps(start()[:6])
        assert len({tuple(x) for x in end.x.round(decimals=4).tolist()}) > 2, name


def test_the_best_that_was_seen_is_decoded_in_parts_and_dropped_rows_are_the_last():
    sizes = []

    class Flow(steer.flow.Wrapped):
        def decode(self, x):
            sizes.append((len(x), torch.is_grad_enabled()))
            return x

    def holes(x):
        return torch.where(x[:, 0] > 0, torch.nan, x[:, 1])

    sampler = built("tree", Flow(mixture()), wrap(holes), 1.0, 4, keep_best=True)
    sampler.batch_size, sampler.drop = 4, True
    sizes.clear()
    *_, end = sampler.steps(start()[:10])
    assert max(n for n, _ in sizes) <= 4
    assert not any(grad for _, grad in sizes[-3:])
    assert not (end.reward < -1e30).logical_and(end.reward.isfinite()).any()


def test_noise_smc_tempers_where_most_rewards_are_dropped():
    def holes(x):
        r = x[:, 0] + 0.5 * x[:, 1]
        return torch.where(r > -0.5, r, torch.nan)

    sampler = built("noise-smc", mixture(), wrap(holes), 0.2, 12, move="pcn")
    sampler.drop = True
    weights = [float(p.ess) for p in sampler.steps(torch.randn(512, 2))]
    assert min(weights[1:]) > 100  # it would be a jump to g = 1 at the end, and an ESS of a few


class OwnGrid(steer.flow.Wrapped):
    """A flow with a grid of its own, as pipelines have one; its jumps are Euler steps."""

    def times(self, steps, start=0.0):
        return [start + (1 - start) * (k / steps) ** 3 for k in range(steps + 1)]

    def jump(self, x, s, t):
        return x + (t - s) * self.velocity(x, s)


def test_several_jumps_are_on_the_model_s_own_grid():
    """So that what is tilted is what `none` draws in as many steps."""
    flow = OwnGrid(mixture())
    x = start()
    wanted = x
    for s, t in itertools.pairwise(flow.times(4)):
        wanted = flow.jump(wanted, s, t)
    looked = Lookahead(flow, wrap(curved), None, 1.0, 4, ramp=torch.ones_like)
    torch.testing.assert_close(looked(x, 0.0), curved(wanted))
    *_, end = NoiseSMC(flow, looked, 2, jumps=4, move="pcn").steps(x)
    torch.testing.assert_close(curved(end.x), end.reward)
    ascended = last(built("reno", flow, wrap(curved), 1.0, 1, jumps=4), x)  # looks, moves nothing
    torch.testing.assert_close(ascended.x, wanted)


def test_the_smoothing_of_inner_steps_is_the_step_s_and_nothing_else_is_paid_for():
    decodes = []

    class Flow(steer.flow.Wrapped):
        def decode(self, x):
            decodes.append(len(x))
            return x

    flow = Flow(mixture())
    end = {}
    for smooth in (0.0, 0.5):
        decodes.clear()
        options = {"mu": 0.1, "rho": 0.0, "inner": 1, "smooth": smooth, "draws": 4}
        end[smooth] = last(built("tfg", flow, wrap(curved), 1.0, 3, **options), start()).x
        # three views and three inner steps, with four draws each where blurred; the end
        assert len(decodes) == (7 if smooth == 0 else 25), decodes
    assert not torch.allclose(end[0.0], end[0.5], atol=1e-4)
