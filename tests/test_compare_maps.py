"""`steer compare-maps`: the laws in the plane, the figures, and a run that is taken up."""

import json

import pytest
import torch

from recipes.compare_maps import compare_maps
from recipes.data.points import POINTS, Checkerboard
from steer.training.map_metric import jacobian_error, lookahead_error, saved_bytes, sliced_w2

TINY = {"velocity_steps": 3, "map_steps": 2, "batch_size": 16, "width": 8, "depth": 1}


def test_the_checkerboards_denoiser_is_a_conditional_mean():
    """`E[(x_1 - D_t(x_t)) f(x_t)] = 0` for any f, within 4 standard errors."""
    law, g = Checkerboard(), torch.Generator().manual_seed(0)
    x_1, x_0 = law.sample(20_000, g), torch.randn(20_000, 2, generator=g).double()
    for t in (0.05, 0.5, 0.95):
        x = (1 - t) * x_0 + t * x_1
        rest = x_1 - law.denoise(x, t)
        for f in (torch.ones_like(x), x, x.sin()):
            term = rest * f
            assert (term.mean(0).abs() < 4 * term.std(0) / len(x) ** 0.5).all()


def test_the_checkerboards_map_carries_noise_to_its_squares():
    law, g = Checkerboard(steps=60), torch.Generator().manual_seed(1)
    y = law.jump(torch.randn(400, 2, generator=g).double(), 0.0, 1.0)
    assert law.inside(y).float().mean() > 0.995
    counts = torch.stack([((y - low).abs() < 1).all(1).float().mean() for low in law.low])
    assert counts.min() > 0.02  # no square is left out


def test_figures_of_a_true_map_are_zero_and_those_of_another_are_not():
    law = POINTS["mixture"]()
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(100, 2, generator=g).double()
    ours, denoiser = lookahead_error(law, law, noise, 0.25)
    assert ours < 1e-6 < 0.1 < denoiser
    assert jacobian_error(law, law, noise[:20], 0.5) < 1e-6
    a, b = law.sample(2000, g), law.sample(2000, g)
    assert sliced_w2(a, b, g) < 0.15
    assert sliced_w2(a, b + 1.0, g) == pytest.approx(1.0, abs=0.1)  # (1, 1) in the mean


def test_what_is_saved_for_the_backward_pass_is_counted():
    w, x = torch.ones(3, 3, requires_grad=True), torch.ones(5, 3)
    assert saved_bytes(lambda: (x @ w).square().sum()) == 4 * (15 + 15)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("maps") / "ring"
    compare_maps(rules=["psd-m"], seeds=1, out=folder, **TINY)
    return folder


def test_a_comparison_is_taken_up_and_another_refused(out):
    before = (out / "rows.jsonl").read_text()
    compare_maps(rules=["psd-m", "lsd"], seeds=1, out=out, **TINY)
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    assert (out / "rows.jsonl").read_text().startswith(before)
    assert [r["rule"] for r in rows] == ["velocity", "psd-m", "lsd"]
    table = (out / "table.md").read_text()
    assert all(name in table for name in ("velocity", "psd-m", "lsd", "true denoiser", "SW2"))
    assert (out / "steps.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="started with other settings"):
        compare_maps(rules=["psd-m"], seeds=1, out=out, **{**TINY, "width": 9})


def test_unknown_names_are_said(tmp_path):
    with pytest.raises(ValueError, match="ring"):
        compare_maps("rong", out=tmp_path / "a")
    with pytest.raises(ValueError, match="lsd"):
        compare_maps(rules=["lsdd"], out=tmp_path / "b")
