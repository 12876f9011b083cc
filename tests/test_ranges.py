"""Numbers that are no numbers, or out of range, are refused where they are given."""

import math

import pytest
import torch

import steer
from steer.guidance.ascent import FlowMapControl, NoiseAscent, whole_reward
from steer.guidance.control import Braked, Clipped, Normalised, Window, Windowed
from steer.path import as_time, step_times
from steer.ranges import above, all_finite, count, finite, symmetric, within
from steer.tuning.settings import Settings

NAN, INF = math.nan, math.inf
FLOW = steer.GaussianMixture(torch.zeros(1, 2), 1.0)
LINEAR = steer.LinearReward(torch.tensor([1.0, 0.3]))
ASKEW = torch.tensor([[1.0, 0.5], [0.1, 1.0]])
LOOK = steer.Lookahead(FLOW, LINEAR)
UP = whole_reward(FLOW, LINEAR, None)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        # mixtures and closed rewards
        (lambda: steer.GaussianMixture([[NAN, 0]], 1.0), r"means must be .* got nan at \[0, 0\]"),
        (lambda: steer.GaussianMixture(torch.zeros(2, 2), [1.0, INF]), r"covariances .* at \[1\]"),
        (lambda: steer.GaussianMixture(torch.zeros(1, 2), NAN), "covariances must be finite"),
        (lambda: steer.GaussianMixture(torch.zeros(1, 2), ASKEW[None]), r"\[0, 1\] and \[1, 0\]"),
        (
            lambda: steer.GaussianMixture(torch.zeros(1, 2), 1.0, torch.tensor([NAN])),
            r"weights \[nan\]: give 1 of them",
        ),
        (lambda: steer.LinearReward(torch.tensor([1.0, NAN])), r"a must be .* at \[1\]"),
        (lambda: steer.LinearReward(torch.ones(2, 2)), r"a of shape \(2, 2\): give a vector"),
        (lambda: steer.QuadraticReward(torch.tensor([NAN]), torch.ones(1, 1)), "centre must be"),
        (lambda: steer.QuadraticReward(torch.zeros(2), ASKEW), "precision must be symmetric"),
        (lambda: steer.QuadraticReward(torch.zeros(2), ASKEW * NAN), "precision must be finite"),
        (lambda: steer.QuadraticReward(torch.zeros(2), torch.eye(3)), r"give \(d,\) and \(d, d\)"),
        (
            lambda: steer.QuadraticReward(torch.zeros(2), torch.diag(torch.tensor([1.0, -1.0]))),
            "eigenvalue -1.*positive semi-definite",
        ),
        *[
            (lambda t=t: FLOW.tilt(LINEAR, t), "temperature must be above zero and finite")
            for t in (-1.0, 0.0, NAN, INF)
        ],
        (lambda: NAN * LINEAR, "weight of a reward must be a finite number, got nan"),
        # paths and times
        (lambda: steer.VariancePreserving(0.1, INF), "both finite"),
        (lambda: steer.VariancePreserving(NAN), "both finite"),
        (lambda: as_time(NAN), "a time must be a finite number"),
        (lambda: FLOW.jump(torch.zeros(1, 2), 0.0, NAN), "a time must be a finite number"),
        (lambda: step_times(0), "steps must be at least 1"),
        (lambda: step_times(2, NAN), r"start must be in \[0, 1\), got nan"),
        # potentials and controls
        (lambda: steer.Lookahead(FLOW, LINEAR, temperature=NAN), "temperature must be above zero"),
        (lambda: steer.Denoised(FLOW, LINEAR, temperature=INF), "temperature must be above zero"),
        (
            lambda: steer.Lookahead(FLOW, LINEAR, steps=1.5),
            "number of jumps must be a whole number, got 1.5",
        ),
        (lambda: Clipped(LOOK, NAN), "bound must be above zero"),
        (lambda: Normalised(LOOK, INF), "length must be above zero and finite"),
        (lambda: Braked(LOOK, NAN), "brake must be a number"),
        (lambda: Windowed(LOOK, NAN, 0.5), "guidance window from nan"),
        (lambda: Windowed(LOOK, times=[0.1, NAN]), r"a guided time must be in \[0, 1\], got nan"),
        (lambda: Window(every=NAN), "every must be a whole number"),
        # kernels
        (lambda: steer.Jump(FLOW, NAN), r"churn must be in \[0, 1\], got nan"),
        (lambda: steer.Jump(FLOW, clip=NAN), "clip must be above zero"),
        (lambda: steer.Sde(FLOW, clip=-1.0), "clip must be above zero"),
        (lambda: steer.Langevin(FLOW, step_size=NAN), "step_size must be above zero"),
        (lambda: steer.Langevin(FLOW, step_size=INF), "step_size must be above zero and finite"),
        (lambda: steer.Langevin(FLOW, moves=NAN), "moves must be a whole number"),
        # samplers
        *[
            (
                lambda t=t: steer.Guidance(LOOK, steer.Jump(FLOW), threshold=t),
                rf"threshold must be in \[0, 1\], got {t}",
            )
            for t in (NAN, 50.0, -0.1, 1.1)
        ],
        (
            lambda: steer.Guidance(LOOK, steer.Jump(FLOW), threshold=(NAN,)),
            r"cannot resample at \[nan\]",
        ),
        (lambda: steer.Guidance(LOOK, steer.Jump(FLOW), scale=NAN), "scale must be a finite"),
        (lambda: steer.Guidance(LOOK, steer.Jump(FLOW), times=[0.0, NAN, 1.0]), "times must incr"),
        (lambda: steer.Guidance(LOOK, steer.Jump(FLOW), batch_size=0), "batch_size must be at le"),
        (lambda: FlowMapControl(FLOW, UP, [0.0, 1.0], NAN), "scale must not be negative nor inf"),
        (lambda: FlowMapControl(FLOW, UP, [0.0, 1.0], INF), "scale must not be negative nor inf"),
        (lambda: FlowMapControl(FLOW, UP, [0.0, 1.0], guided=[NAN]), "cannot guide at"),
        (lambda: NoiseAscent(FLOW, UP, 3, rate=INF), "rate must be above zero and finite"),
        (lambda: NoiseAscent(FLOW, UP, NAN), "iterations must be a whole number"),
        # requests
        (lambda: steer.sample(FLOW, LINEAR, budget=NAN), "budget must be a finite number"),
        (lambda: steer.sample(FLOW, LINEAR, particles=2.5), "particles must be a whole number"),
        (
            lambda: steer.sample(FLOW, LINEAR, method="fmtt", noise=NAN),
            "noise must not be negative nor infinite",
        ),
        (lambda: Settings(learning_rate=INF), "learning_rate must be above zero and finite"),
        (lambda: Settings(alpha=NAN), "alpha must be above zero"),
        (lambda: Settings(sweep=[0.5, NAN]), "sweep must be a finite number"),
    ],
)
def test_what_is_no_number_is_refused_at_the_door(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_sde_noise_that_is_no_number_is_refused_in_its_step():
    guide = steer.Guidance(LOOK, steer.Sde(FLOW, noise=lambda t: NAN))
    with pytest.raises(ValueError, match="noise of the SDE is nan at t = 0"):
        guide(torch.zeros(4, 2))


def test_the_right_ones_pass():
    assert above("x", 0.5) == within("x", 0.5, 0, 1) == finite("x", 0.5) == 0.5
    assert count("x", 3) == 3
    values = torch.eye(2)[None] * 4
    assert torch.equal(all_finite("x", values), symmetric("x", values))
    Clipped(LOOK, INF)  # no bound
    Braked(LOOK, INF)  # no brake
    for threshold in (0, 0.5, 1):
        steer.Guidance(LOOK, steer.Jump(FLOW), threshold=threshold)
    near = torch.tensor([[2.0, 1.0], [1.0 + 1e-6, 2.0]])
    steer.GaussianMixture(torch.zeros(1, 2), near[None])
    steer.QuadraticReward(torch.zeros(2), torch.zeros(2, 2))
