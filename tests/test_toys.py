"""The published toys of flow-map trajectory tilting (2511.22688), on closed forms."""

import pytest

from benchmarks.evidence import ratio
from benchmarks.toys import EXACT_LINE, line, quadrature, ring


def test_the_exact_values_are_those_of_quadrature():
    assert quadrature() == pytest.approx(EXACT_LINE, abs=5e-4)


@pytest.mark.slow
def test_line():
    """One run of 40,000 particles, 400 steps: within 4 SE and 1 %."""
    found, errors = line()
    for name, exact in EXACT_LINE.items():
        assert abs(found[name] - exact) < 4 * errors[name], name
        assert abs(found[name] - exact) < 0.01 * abs(exact), name


def test_line_in_short():
    """A tenth of the particles, an eighth of the steps: within 4 SE, and the scheme's O(step)."""
    found, errors = line(particles=4000, steps=50)
    for name, exact in EXACT_LINE.items():
        assert abs(found[name] - exact) < 4 * errors[name] + 0.02 * abs(exact), name
        assert errors[name] < 0.03


def test_the_published_scheme_gives_no_evidence_in_few_steps():
    """As the README and docs/results.md say: low by a quarter at 5 steps; `split` is not."""
    published, exact = ratio("fmtt", 5, 60), ratio("split", 5, 60)
    assert published.error < 0.05
    assert published.mean < 0.85
    assert exact.error < 0.06
    assert abs(exact.mean - 1) < 4 * exact.error


@pytest.mark.slow
def test_ring():
    """The mean of 10 seeds: the views are ordered as published."""
    found = {view: ring(view) for view in ("flow map", "denoiser", "naive")}
    ours, denoised, naive = (found[view]["no"] for view in found)
    assert ours["share"] >= denoised["share"] + 0.06
    assert denoised["share"] >= naive["share"] + 0.03
    assert ours["reward"] > denoised["reward"] > naive["reward"]
    for view in ("flow map", "denoiser"):
        assert found["naive"]["once"]["share"] <= found[view]["once"]["share"] - 0.06
