"""`benchmarks.published`: what it reproduces stays reproduced."""

import pytest
import torch

from benchmarks.published import damped, das, denoisers, fmrg, mfm, ring
from benchmarks.toys import ring_reward
from benchmarks.tuning_oracles import transport_optimum

slow = pytest.mark.slow


def test_the_transport_toy_has_its_published_figures():
    """.142, .367 and .617 of 2609.27033, and guidance by the base's lookahead beside them."""
    assert fmrg.tilted(0) == pytest.approx(fmrg.PUBLISHED["base"], abs=5e-4)
    assert fmrg.tilted(7) == pytest.approx(fmrg.PUBLISHED["exponential tilt"], abs=5e-4)
    assert transport_optimum(strength=7)[0] == pytest.approx(
        fmrg.PUBLISHED["transport optimum"], abs=5e-4
    )
    assert fmrg.guided(7, steps=60, n=401) == pytest.approx(fmrg.SOLVED[7], abs=2e-3)


@slow
def test_guidance_by_the_lookahead_has_its_figures_at_every_strength():
    for strength, wanted in fmrg.SOLVED.items():
        assert fmrg.guided(strength) == pytest.approx(wanted, abs=6e-4)


@pytest.mark.parametrize("at", damped.POINTS)
def test_the_plug_in_over_drives_by_its_figures(at):
    assert damped.shift(*at) == pytest.approx(damped.POINTS[at], rel=1.5e-3)


@slow
def test_damping_mends_a_mode_and_weighs_none_anew():
    made = {f.what: f for f in damped.figures()}

    def off(name):
        f = made[name]
        return abs(f.ours - f.wanted)

    # a quadratic reward: exact with damping, too far and too narrow without
    mean = "two modes, mean of x_2, {}"
    assert off(mean.format("damped")) < 4 * made[mean.format("damped")].error
    assert off(mean.format("dps")) > 0.4
    assert off("two modes, sd of x_2, damped") < 0.03
    assert made["two modes, sd of x_2, dps"].ours < 0.46
    # no quadratic: the spread across the valley is kept alone with damping
    for where in ("double well, σ² = 0.5, λ = 1", "double well, σ² = 16, λ = 0.1"):
        assert off(f"{where}, spread across, damped") < 0.06
        assert off(f"{where}, spread across, dps") > 0.05
    # neither chooses modes; best-of-n does, as 1 - 2^-n
    for k in (1, 2, 4):
        f = made[f"step reward, best of {k}, right mode"]
        assert abs(f.ours - f.wanted) < 4 * f.error
    for name in ("dps", "damped"):
        f = made[f"bump reward, right mode, {name}"]
        assert f.wanted > 0.98
        assert f.ours < 0.7


@slow
def test_das_approaches_the_tilt_where_guidance_overshoots():
    made = {f.what: f for f in das.figures()}
    exact = das.exact()[0]
    assert abs(made["E r, das, n = 16"].ours - exact) < 4 * made["E r, das, n = 16"].error
    few, many = (made[f"E r, das, n = {n}"].ours - exact for n in (1, 16))
    assert few > 0.15
    assert abs(many) < few / 2
    assert made["E r, dps"].ours - exact > 4 * made["E r, dps"].error


def test_the_denoiser_has_the_least_error_of_all_views():
    """1.186 at u = t and 1.721 at u = 1 are published."""
    flow, g = denoisers.mixture(), torch.Generator().manual_seed(1)
    clean = flow.sample(20_000, g)
    x = 0.3 * clean + 0.7 * torch.randn(20_000, 2, generator=g)
    error = {
        u: float((denoisers.view(flow, x, 0.3, u) - clean).square().sum(1).mean())
        for u in (0.3, 0.65, 1.0)
    }
    assert error[0.3] < error[0.65] < error[1.0]
    for u, (wanted, _) in denoisers.PUBLISHED.items():
        assert error[u] == pytest.approx(wanted, rel=0.03)


@slow
def test_the_map_s_end_has_the_data_s_law_and_the_denoiser_has_not():
    """.538 at u = t and .0038 at u = 1 are published."""
    pytest.importorskip("scipy")
    made = {f.what: f.ours for f in denoisers.figures(few=500)}
    assert made["W2², u = 0.3"] == pytest.approx(0.538, rel=0.12)
    assert made["W2², u = 1"] < 0.06  # the floor of two samples of 500


@slow
def test_more_posterior_draws_come_nearer_to_the_posterior():
    made = {f.what: f.ours for f in mfm.figures(counts=(1, 4, 16, 64), seeds=2)}
    one, four, many, most, floor = made.values()
    assert one > 3 * four > 6 * many
    assert most < 0.3
    assert floor < most


@slow
def test_search_on_the_ring_climbs_nearly_all_the_way_and_loses_modes():
    """100 % and 0.00 in one or two modes are published."""
    x = ring.searched(2, seed=0)
    assert float((x[:, 0] > 0).float().mean()) > 0.95
    assert float(ring_reward(x).mean()) > -0.01
    assert ring.occupied(x) <= 5
