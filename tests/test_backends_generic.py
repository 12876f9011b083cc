"""Pipelines of classes that no family names: found out by watching them, or refused."""

from itertools import pairwise

import diffusers
import pytest
import torch

import steer
from steer.backends.deducing import Levels, levels_of
from steer.backends.generic import generic
from steer.backends.table import FAMILIES, flow_of
from tests import tiny_pipelines as tiny
from tests.tiny_flows import pipe, pipeline

WORKING = [
    name for name in tiny.NAMES
    if name.startswith("generic") and name not in (*tiny.REFUSED, "generic_ltx")
]  # fmt: skip
NOISE = ("generic_pixart", "generic_hunyuan_dit")
KNOWN = ("flux", "sd3", "sdxl", "qwen_image")
"""Families that are named, to be found as if they were not."""


def found(name, *, on=False, maker=flow_of, **options):
    call = dict(tiny.CALLS[name])
    size = {k: call.pop(k) for k in ("height", "width") if k in call}
    switch = {"cfg": tiny.GUIDANCE[name][2 if on else 1]} if tiny.GUIDANCE[name] else {}
    return maker(pipe(name), **{**size, **switch, "call": call, **options})


def euler_latents(flow, prompt="a red cube", steps=4):
    """Return states along the pipeline's grid, from the state that the pipeline starts from."""
    call = flow.arguments_of_call(prompt, steps)
    (first, *_) = flow.source.recorder(1, generator=torch.Generator().manual_seed(0), **call)
    x = flow.state_of(first)[:1].float()
    times = flow.times(steps)
    bound = flow.given([prompt]).along(times)
    with torch.no_grad():
        for s, t in pairwise(times):
            x = bound.jump(x, s, t)
    return bound, x


@pytest.mark.parametrize("on", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize("name", [n for n in WORKING if n not in NOISE])
def test_pictures_are_those_of_the_pipeline(name, on):
    flow = found(name, on=on)
    assert type(flow.source.pipe).__name__ not in FAMILIES
    bound, x = euler_latents(flow)
    wanted = pipeline(name, on=on, steps=4)
    tolerance = 2e-3 if name == "generic_cogview4" else 1e-4  # its times are whole numbers
    torch.testing.assert_close(bound.decode(x).clamp(0, 1), wanted, atol=tolerance, rtol=0)


@pytest.mark.parametrize("on", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize("name", NOISE)
def test_noise_predictions_are_found_too(name, on):
    """Their schedulers are multi-step; by DDIM the pictures are the pipeline's."""
    made = tiny.build(name)
    made.scheduler = diffusers.DDIMScheduler.from_config(
        made.scheduler.config, timestep_spacing="trailing", clip_sample=False
    )
    call = dict(tiny.CALLS[name])
    size = {k: call.pop(k) for k in ("height", "width")}
    flow = flow_of(made, **size, cfg=tiny.GUIDANCE[name][2 if on else 1], call=call)
    bound, x = euler_latents(flow)
    wanted = tiny.run(made, name, steps=4, **tiny.guided(made, name, on=on))
    torch.testing.assert_close(bound.decode(x).clamp(0, 1), wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("on", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize("name", KNOWN)
def test_a_known_class_is_found_as_its_family_says(name, on):
    if name == "flux":
        guess, known = found(name, maker=generic, cfg=None), found(name)
    else:
        guess, known = (found(name, on=on, maker=maker) for maker in (generic, flow_of))
    torch.manual_seed(0)
    x = torch.randn(2, *known.event_shape)
    guess, known = guess.given(["a fox"]), known.given(["a fox"])
    with torch.no_grad():
        a, b = guess.jump(x, 0.3, 0.7), known.jump(x, 0.3, 0.7)
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(guess.decode(x), known.decode(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("generic_kandinsky_prior", "neither a `transformer` nor a `unet`"),
        ("generic_stable_audio", "says neither noise levels of a flow nor alphas_cumprod"),
        ("generic_inpaint", "takes more than a noisy picture"),
        ("generic_ltx", "its states are not decoded as tokens"),
    ],
)
def test_what_is_no_flow_is_refused_with_the_reason(name, reason):
    with pytest.raises(ValueError, match="cannot be used as a flow") as error:
        found(name)
    assert reason in str(error.value)
    assert "docs/models.md" in str(error.value)


def test_a_pipeline_that_wants_a_picture_is_refused():
    made = diffusers.StableDiffusionImg2ImgPipeline(**pipe("sd15_ddim").components)
    with pytest.raises(ValueError, match="called with only a prompt it raises"):
        flow_of(made, height=32, width=32)


def test_a_step_that_is_no_euler_step_is_refused(monkeypatch):
    """A pipeline that changes its states in a way of its own."""
    made = tiny.build("generic_auraflow")
    step = made.scheduler.step

    def bent(*args, **kwargs):
        out = step(*args, **kwargs)
        return (out[0] * 1.5, *out[1:]) if isinstance(out, tuple) else out

    made.scheduler.step = bent
    call = dict(tiny.CALLS["generic_auraflow"])
    with pytest.raises(ValueError, match="is not an Euler step of the flow"):
        flow_of(made, height=call.pop("height"), width=call.pop("width"), cfg=1.0, call=call)


def test_the_pipeline_keeps_its_scheduler_and_forward():
    made = tiny.build("generic_pixart")
    scheduler = made.scheduler
    call = dict(tiny.CALLS["generic_pixart"])
    flow_of(made, height=call.pop("height"), width=call.pop("width"), call=call)
    assert made.scheduler is scheduler
    assert "forward" not in vars(made.transformer)


def test_another_size_and_scale_are_found_anew():
    flow = found("generic_cogview4")
    assert flow.sized(64, 32).event_shape != flow.event_shape
    guided = flow.guided(3.0)
    assert (guided.cfg, guided.evaluations, flow.evaluations) == (3.0, 2, 1)


def test_it_is_steered():
    flow = found("generic_lumina2")
    red = steer.sample(
        flow, lambda images: images[:, 0].mean((1, 2)), prompts=["a"], method="fmrg-j",
        steps=3, particles=2, seed=0,
    )  # fmt: skip
    assert torch.isfinite(red.images).all()


@pytest.mark.parametrize(
    "wanted", [Levels(0, 1000, 1), Levels(1, -1, 1), Levels(0, 1, 0.4), Levels(0, 1000, 3.0)]
)
def test_times_of_levels(wanted):
    levels = torch.tensor([1.0, 0.9, 0.6, 0.3, 0.0])
    assert_levels = levels_of(levels, wanted(levels[:4].double()).tolist())
    grid = torch.linspace(0.05, 1, 9).double()
    torch.testing.assert_close(assert_levels(grid), wanted(grid), rtol=1e-6, atol=1e-6)


def test_times_that_follow_nothing():
    with pytest.raises(ValueError, match="follow no shift"):
        levels_of(torch.tensor([1.0, 0.8, 0.6, 0.3, 0.0]), [1.0, 0.2, 0.9, 0.3])
