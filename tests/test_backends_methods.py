"""Every sampling method steers every family: a colour reward over 16 seeds."""

import warnings

import pytest
import torch

import steer
from tests.tiny_flows import FAMILIES, flow

QUICK = ("flux", "flux3_klein", "sdxl", "sd3", "wan")
SEEDS = 16
METHODS = {
    "fmrg-j": {"scale": 1.0},
    "reno": {"rate": 0.3},
    "fmtt": {"share": 0.01},
    "split": {"share": 0.01},
    "best-of-n": {},
}
"""Method -> options; `share` is its temperature in standard deviations of the reward."""


def red(images):
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


def gain_in_standard_errors(name):
    """Return each method's paired gain over no guidance, same seeds, in its standard errors."""
    one, seeds = flow(name), ["a red cube"] * SEEDS  # a prompt's place keys its noise
    run = {"prompts": seeds, "steps": 6, "particles": 4, "seed": 0}
    plain = steer.sample(one, red, method="none", **run).rewards
    found = {}
    for method, options in METHODS.items():
        options = dict(options)
        if "share" in options:
            options["temperature"] = options.pop("share") * float(plain.std())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # students have no velocity of their own
            rewards = steer.sample(one, red, method=method, **run, **options).rewards
        got = rewards.amax(-1) if method == "best-of-n" else rewards.mean(-1)
        gain = got - plain.mean(-1)
        found[method] = float(gain.mean() / (gain.std() / SEEDS**0.5))
    return found


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in FAMILIES]
)
def test_each_method_raises_the_reward(name):
    found = gain_in_standard_errors(name)
    print(name, {method: round(z, 1) for method, z in found.items()})
    assert min(found.values()) > 3, found


def test_what_a_student_lacks_is_said_by_name():
    one = flow("sana_sprint")
    with pytest.warns(UserWarning, match=r"method 'fmtt' takes the model's velocity, .*Pair"):
        steer.sample(one, red, prompts=["a"], method="fmtt", steps=2, temperature=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steer.sample(one, red, prompts=["a"], method="fmrg-j", steps=2)
        pair = steer.Pair(flow("sana"), one)
        steer.sample(pair, red, prompts=["a"], method="fmtt", steps=2, temperature=1.0)


@pytest.mark.parametrize("name", ["flux", "sdxl"])
def test_guidance_is_steered_with_too(name):
    """Classifier-free guidance mixed at run time, and a negative prompt."""
    one = flow(name, on=True, negative_prompt="blue")
    result = steer.sample(one, red, prompts=["a", "b"], method="fmrg-j", steps=2, particles=2)
    assert torch.isfinite(result.images).all()
    assert result.nfe == pytest.approx(2 * steer.sample(
        flow(name), red, prompts=["a", "b"], method="fmrg-j", steps=2, particles=2
    ).nfe)  # fmt: skip
