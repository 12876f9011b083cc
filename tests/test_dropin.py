"""Reward guidance in a pipeline's own loop: the steps of `fmrg-j`, and nothing at scale 0."""

import pytest
import torch

import rewards
import steer
from steer.guidance.ascent import whole_reward
from steer.reward import wrap
from tests import tiny_pipelines as tiny
from tests.test_backends import begun, like_the_pipelines, off
from tests.tiny_flows import PROMPT, flow, pipe, seen_as, switched

NAMES = (
    "sdxl", "sd3", "flux", "sd15_ddim", "sd15_flow", "qwen_image", "wan", "z_image", "sana",
    "flux2_klein",
)  # fmt: skip
ASKS = ("sdxl", "sd3", "sana_sprint", "wan", "sd15_ddim")
"""Pipelines that ask a callback for its tensor inputs, and so say who they are."""


def red(images):
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


def drawn(name, guidance=None, *, on=False, steps=3, **more):
    with switched(pipe(name), name, on) as scale:
        call = {} if guidance is None else {"callback_on_step_end": guidance}
        return tiny.run(pipe(name), name, steps=steps, **scale, **call, **more).float()


def guided(name, scale=0.3, on=False):
    cfg = tiny.GUIDANCE[name]
    more = {"cfg": cfg[2]} if on and cfg and cfg[0] == "true_cfg_scale" else {}
    return steer.RewardGuidance(red, scale, pipe=pipe(name), **more)


@pytest.mark.parametrize("on", [False, True], ids=["plain", "mixed"])
@pytest.mark.parametrize("name", NAMES)
def test_it_is_fmrg_j(name, on):
    if on and not tiny.GUIDANCE[name]:
        pytest.skip("it mixes no guidance")
    one, scale = flow(name, on=on), 0.4
    guidance = guided(name, scale, on)
    latents = drawn(name, guidance, on=on, output_type="latent")
    guidance.remove()
    x, _ = begun(one, 3)
    times = one.times(3)
    bound = one.given([PROMPT]).along(times)
    control = steer.FlowMapControl(bound, whole_reward(bound, wrap(red), [PROMPT]), times, scale)
    *_, last = control.steps(x)
    if name == "sd15_ddim":  # its scheduler stops before the data
        assert off(last.x, latents) < 0.05
    else:
        assert off(like_the_pipelines(bound, last.x, latents), latents) < 2e-4


@pytest.mark.parametrize("name", [*NAMES, "sana_sprint", "sdxl_lcm"])
def test_scale_zero_is_the_plain_picture(name):
    guidance = guided(name, 0.0)
    assert torch.equal(drawn(name, guidance), drawn(name))
    guidance.remove()


@pytest.mark.parametrize("name", ASKS)
def test_most_pipelines_say_who_they_are(name):
    guidance = steer.RewardGuidance(red, 1.0)
    assert red(drawn(name, guidance)).mean() > red(drawn(name)).mean()
    guidance.remove()


def test_others_are_named():
    with pytest.raises(ValueError, match="pipe=pipe"):
        drawn("flux", steer.RewardGuidance(red))


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux", "sana_sprint"])
def test_the_reward_rises(name):
    """By more than three standard errors of 16 seeds."""
    guidance, gains = guided(name, 1.0), []
    for seed in range(16):
        plain, moved = (red(drawn(name, g, seed=seed)) for g in (None, guidance))
        gains.append(moved - plain)
    guidance.remove()
    gain = torch.cat(gains)
    assert gain.mean() > 3 * gain.std() / 4


def test_one_more_call_a_step_and_no_more_texts():
    calls = {"unet": 0, "text": 0}
    built = tiny.build("sdxl")
    hooks = [
        built.unet.register_forward_pre_hook(lambda *_: calls.update(unet=calls["unet"] + 1)),
        built.text_encoder.register_forward_pre_hook(
            lambda *_: calls.update(text=calls["text"] + 1)
        ),
    ]
    tiny.run(built, "sdxl", steps=3, guidance_scale=1.0)
    before = dict(calls)
    calls.update(unet=0, text=0)
    guidance = steer.RewardGuidance(red, pipe=built)
    tiny.run(built, "sdxl", steps=3, guidance_scale=1.0, callback_on_step_end=guidance)
    assert calls == {"unet": before["unet"] + 3, "text": before["text"]}
    assert hooks


def test_a_pipeline_that_hears_no_callback_is_guided_by_its_scheduler():
    made = pipe("prx")
    plain = drawn("prx")
    with steer.RewardGuidance(red, 1.0).around(made):
        moved = drawn("prx")
    assert red(moved).mean() > red(plain).mean()
    assert torch.equal(drawn("prx"), plain)
    assert "step" not in vars(made.scheduler)


@pytest.mark.parametrize(
    ("name", "on"), [("flux3_klein", False), ("flux3_base", True), ("prx", True)]
)
def test_by_its_scheduler_it_is_fmrg_j_too(name, on):
    """Modular pipelines hear no callback; the guider of FLUX.3's base says its scale."""
    one = flow(name, on=on)
    with steer.RewardGuidance(red, 0.4).around(pipe(name)):
        latents = drawn(name, on=on, output_type="latent")
    x, _ = begun(one, 3)
    times = one.times(3)
    bound = one.given([PROMPT])
    control = steer.FlowMapControl(bound, whole_reward(bound, wrap(red), [PROMPT]), times, 0.4)
    *_, last = control.steps(x)
    assert off(like_the_pipelines(bound, last.x, latents), latents) < 2e-4
    with steer.RewardGuidance(red, 0.0).around(pipe(name)):
        zero = drawn(name, on=on)
    assert torch.equal(zero, drawn(name, on=on))


@pytest.mark.parametrize("name", ["flux3_klein", "flux3_base"])
def test_as_a_block_of_a_modular_pipeline_it_is_the_same(name):
    made, guidance = pipe(name), steer.RewardGuidance(red, 0.4)
    plain = drawn(name)
    with guidance.around(made):
        wanted = drawn(name)
    built = guidance.into(made)
    tiny.silence(built._blocks)
    with switched(built, name, False):
        assert torch.equal(tiny.run(built, name, steps=3).float(), wanted)
    guidance.remove()
    still = steer.RewardGuidance(red, 0.0)
    zero = still.into(made)
    tiny.silence(zero._blocks)
    with switched(zero, name, False):
        assert torch.equal(tiny.run(zero, name, steps=3).float(), plain)
    still.remove()
    assert torch.equal(drawn(name), plain)  # it has no block


def test_only_modular_pipelines_have_blocks():
    with pytest.raises(ValueError, match="callback_on_step_end"):
        steer.RewardGuidance(red).into(pipe("sdxl"))


def test_pictures_that_are_not_square_and_several_prompts():
    one = seen_as(pipe("flux"), "flux", height=32, width=16)
    guidance = guided("flux", 0.5)
    more = {"height": 32, "width": 16, "prompt": ["a", "b"]}
    moved = drawn("flux", guidance, **more)
    guidance.remove()
    assert moved.shape[-2:] == (32, 16)
    assert (red(moved) > red(drawn("flux", **more))).all()
    assert one.event_shape == flow("flux").sized(32, 16).event_shape


def test_errors():
    with pytest.raises(ValueError, match="lower the reward"):
        steer.RewardGuidance(red, -1.0)
    with pytest.raises(ValueError, match="not a family that is known"):
        steer.RewardGuidance(red, pipe=tiny.build("generic_auraflow"))
    built = tiny.build("sdxl")
    built.unet.train()
    with pytest.raises(ValueError, match=r"in training mode, .*pipe.unet.eval\(\)"):
        steer.RewardGuidance(red, pipe=built)
    blind = steer.RewardGuidance(rewards.wrap(red, differentiable=False), pipe=pipe("sdxl"))
    with pytest.raises(ValueError, match="declared not differentiable"):
        drawn("sdxl", blind)
    blind.remove()
    guidance = steer.RewardGuidance(red, pipe=pipe("qwen_image"))
    with pytest.raises(ValueError, match=r"cfg=4\.0"):
        drawn("qwen_image", guidance, on=True)
    guidance.remove()
