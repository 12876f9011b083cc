"""The user's pipeline is a guest: encoded once, left as it was, refused where it cannot serve."""

import threading

import diffusers
import pytest
import torch
from torch import nn

import steer
from steer.backends.recording import modules_of
from steer.objectives.direct import Direct
from steer.reward import wrap
from steer.testing import FlowMapContract, OneJumpContract, VelocityContract
from steer.tuning.prompts import Prompts
from steer.tuning.request import Tuning
from steer.tuning.settings import Settings
from tests import tiny_pipelines as tiny
from tests.tiny_flows import FAMILIES, PROMPT, flow, seen_as, source

SEVERAL = ("flux", "sdxl", "sd3", "sana_sprint", "flux3_klein", "qwen_image", "wan")


def red(images):
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


def encoders(built):
    return {k: m for k, m in modules_of(built).items() if "text_encoder" in k}


def counted(built):
    """Count the calls of each text encoder from here on."""
    counts = dict.fromkeys(encoders(built), 0)
    for name, module in encoders(built).items():

        def count(*_, name=name):
            counts[name] += 1

        module.register_forward_pre_hook(count)
    return counts


@pytest.mark.parametrize("name", FAMILIES)
def test_each_prompt_is_encoded_once(name):
    built = tiny.build(name)
    counts = counted(built)
    one = seen_as(built, name)
    one.given([PROMPT])
    once = dict(counts)
    one.given([PROMPT, PROMPT])
    steer.sample(one, red, prompts=[PROMPT], method="none", steps=4, particles=2)
    steer.sample(one, red, prompts=[PROMPT], method="none", steps=2, particles=2)
    assert counts == once
    assert any(counts.values())


@pytest.mark.parametrize("name", SEVERAL)
def test_text_encoders_are_released(name):
    built = tiny.build(name)
    one = seen_as(built, name)
    bound, times = one.given([PROMPT]), one.times(2)
    one.release_text_encoders()
    assert not any(isinstance(m, nn.Module) for m in encoders(built).values())
    x = torch.randn(1, *one.event_shape, generator=source(1))
    with torch.no_grad():
        assert torch.equal(one.given([PROMPT]).jump(x, 0.2, 0.7), bound.jump(x, 0.2, 0.7))
    assert one.times(2) == times
    assert len(one.times(7)) == 8
    result = steer.sample(one, red, prompts=[PROMPT], method="fmrg-j", steps=2)
    assert torch.isfinite(result.images).all()
    with pytest.raises(RuntimeError, match=r"text encoders were released|None"):
        one.given(["another prompt"])


def state_of(built):
    """What a user could notice of a pipeline."""
    found = {}
    for name, module in modules_of(built).items():
        for inner, m in module.named_modules():
            own = {k: v for k, v in vars(m).items() if not k.startswith("__")}
            found[name, inner] = m.training, sorted(own), len(m._forward_pre_hooks)
        for inner, p in module.named_parameters():
            found[name, "parameter", inner] = p.requires_grad, p.dtype, p.device, p._version
    rest = {k: type(v) for k, v in vars(built).items() if k not in ("_guidance_scale",)}
    settings = getattr(built, "_progress_bar_config", None)
    return found, {k: v for k, v in rest.items() if not k.startswith("_")}, settings


@pytest.mark.parametrize("name", SEVERAL)
def test_the_pipeline_is_left_as_it_was(name):
    built = tiny.build(name)
    network = tiny.denoiser(built)
    next(network.parameters()).requires_grad_(False)
    tiny.run(built, name)  # which leaves some things of its own
    network.train()
    built_before = state_of(built)
    one = seen_as(built, name)
    steer.sample(one, red, prompts=[PROMPT], method="fmrg-j", steps=2, particles=2)
    assert "forward" not in vars(network)
    assert "encode_prompt" not in vars(built)
    assert state_of(built) == built_before


@pytest.mark.parametrize("name", ["flux", "flux3_klein"])
def test_also_after_an_exception(name):
    built = tiny.build(name)
    network = tiny.denoiser(built)
    one = seen_as(built, name)
    tiny.run(built, name)
    before = state_of(built)
    with pytest.raises(Exception):  # noqa: B017, PT011  whatever the pipeline says of it
        seen_as(built, name, call={"max_sequence_length": "many"}).given([PROMPT])
    assert state_of(built) == before
    assert "forward" not in vars(network)
    assert torch.isfinite(one.given([PROMPT]).jump(torch.zeros(1, *one.event_shape), 0, 1)).all()


def test_another_thread_samples_while_a_prompt_is_recorded():
    """The function in the denoiser's place is for the thread that records."""
    built = tiny.build("flux")
    one = seen_as(built, "flux")
    bound = one.given([PROMPT])
    x = torch.randn(1, *one.event_shape, generator=source(1))
    with torch.no_grad():
        wanted = bound.jump(x, 0.2, 0.7)
        encode, found = built.encode_prompt, []

        def slow(*args, **kwargs):
            def other():
                with torch.no_grad():
                    found.append(bound.jump(x, 0.2, 0.7))

            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
            return encode(*args, **kwargs)

        built.encode_prompt = slow
        one.given(["a dog"])
    assert torch.equal(found[0], wanted)
    assert built.encode_prompt is slow  # the user's own, put back


def test_a_run_on_another_device_is_refused():
    tuning = Tuning(
        flow("flux"), wrap(red), Prompts([PROMPT]), Direct(), 1, 1.0, None, None, {},
        0, Settings(),
    )  # fmt: skip
    refused(ValueError, lambda: tuning.adapted(torch.device("meta")), "pipe.to('meta')")


def test_it_samples_as_before_by_itself():
    built = tiny.build("sdxl")
    before = tiny.run(built, "sdxl")
    steer.sample(seen_as(built, "sdxl"), red, prompts=["a dog"], method="reno", steps=2)
    assert torch.equal(tiny.run(built, "sdxl"), before)


COMMON = [
    "test_shapes", "test_identity", "test_lookahead_is_the_jump_to_one",
    "test_denoiser_and_score_follow_from_the_velocity", "test_kinds_of_times",
    "test_rows_do_not_see_each_other",
]  # fmt: skip
"""What holds of any weights; composition and its like hold of trained maps alone."""

OWN = {
    "two-time": (FlowMapContract, []),
    "one-jump": (OneJumpContract, ["test_jumps_lead_through_the_picture"]),
    "velocity": (VelocityContract, ["test_short_jumps_follow_the_velocity"]),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_keeps_the_contract_of_its_kind(name):
    one = flow(name).given([PROMPT])
    base, more = OWN[one.kind]

    class Contract(base):
        n, tolerance = 2, 1e-4

        def create_flow(self):
            return one

    with torch.no_grad():
        for test in COMMON + ([] if hasattr(one.source.pipe, "unet") else more):
            getattr(Contract(), test)()


@pytest.mark.parametrize("name", [n for n in FAMILIES if n.startswith("sdxl_t")])
def test_jumps_of_a_student_of_noise_lead_through_its_picture(name):
    """From within its schedule: below t = .064 the state is pure noise to it."""
    one = flow(name).given([PROMPT])
    x = torch.randn(2, *one.event_shape, generator=source(1))
    with torch.no_grad():
        data = one.lookahead(x, 0.3)
        noise = (x - 0.3 * data) / 0.7
        torch.testing.assert_close(
            one.jump(x, 0.3, 0.8), 0.2 * noise + 0.8 * data, rtol=1e-4, atol=1e-4
        )


# ------------------------------------------------------------------ errors


def refused(error, call, *words):
    with pytest.raises(error) as found:
        call()
    text = " ".join(str(found.value).split())
    for word in words:
        assert word in text, text


def test_a_resolution_that_does_not_divide():
    built = tiny.build("flux")
    refused(
        ValueError, lambda: steer.load(built, height=33), "height 33 is not a multiple of", "take "
    )
    refused(ValueError, lambda: flow("flux").sized(32, 31), "width 31")


def test_guidance_that_a_model_does_not_have():
    refused(ValueError, lambda: flow("sana_sprint", cfg=3.0), "leave cfg out", "give guidance")
    refused(ValueError, lambda: flow("sd3", guidance=3.0), "give cfg")
    refused(ValueError, lambda: flow("flux2_klein", cfg=4.0).given([PROMPT]), "leave cfg out")


def test_an_argument_that_the_pipeline_does_not_take():
    refused(
        ValueError, lambda: steer.load(tiny.build("flux"), call={"max_length": 3}),
        "no argument 'max_length'", "max_sequence_length",
    )  # fmt: skip


def test_a_denoiser_whose_signature_changed():
    class Renamed(diffusers.FluxTransformer2DModel):
        def forward(self, hidden_states, time, **kwargs):
            return super().forward(hidden_states, timestep=time, **kwargs)

    built = tiny.build("flux")
    built.transformer.__class__ = Renamed
    refused(TypeError, lambda: steer.load(built), "Renamed.forward has no argument 'timestep'")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_precision_that_the_device_does_not_have(monkeypatch, dtype):
    built = tiny.build("flux")
    built.transformer.to(dtype)

    def cannot(*_, **__):
        raise RuntimeError("not implemented for 'Half'")

    monkeypatch.setattr(torch.nn.functional, "conv2d", cannot)
    name = str(dtype).removeprefix("torch.")
    refused(ValueError, lambda: steer.load(built), f"{name} does not work on cpu", "float32")


def test_an_offloaded_pipeline():
    """It samples, and takes no gradient; the error says what else saves memory."""
    from accelerate.hooks import CpuOffload, add_hook_to_module

    built = tiny.build("flux")
    add_hook_to_module(built.transformer, CpuOffload("cpu"))
    hooked = built.transformer.forward
    one = seen_as(built, "flux")
    one.given([PROMPT])
    assert built.transformer.forward is hooked
    assert torch.isfinite(
        steer.sample(one, red, prompts=[PROMPT], method="none", steps=1).images
    ).all()
    refused(
        ValueError, lambda: steer.sample(one, red, prompts=[PROMPT], method="fmrg-j", steps=1),
        "transformer is offloaded", "checkpointing=True",
    )  # fmt: skip


@pytest.mark.parametrize("given", ["a fox", []])
def test_prompts_that_are_no_list(given):
    with pytest.raises((TypeError, ValueError), match=r"prompts"):
        flow("flux").given(given)


def test_rows_that_do_not_split():
    bound = flow("flux").given(["a", "b"])
    with pytest.raises(ValueError, match="3 rows do not split evenly over 2 prompts"):
        bound.velocity(torch.zeros(3, *bound.event_shape), 0.5)
