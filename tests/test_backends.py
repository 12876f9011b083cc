"""Every family of pipelines as a flow: the pipeline's own latents and pictures, batches, times."""

from itertools import pairwise

import diffusers
import pytest
import torch

import steer
from steer.backends.pipeline import rows_time
from tests import tiny_pipelines as tiny
from tests.tiny_flows import (
    CASES,
    FAMILIES,
    PROMPT,
    flow,
    made,
    pipe,
    pipeline,
    seen_as,
    source,
    start,
    switched,
)

STEPS = {"sdxl_turbo": 1, "sana_sprint": 2}
"""Turbo's sampler is ancestral: of one step it is ours. Sprint has two."""

SHORT = ("sd15_ddim", "sdxl_tcd")
"""Their schedulers stop at the first training step, and not at the data."""


def begun(one, steps):
    """Return the pipeline's own noise as a state, and the generator after it was drawn.

    Turbo's scheduler begins with a little less than unit variance.
    """
    x, drawn = start(one, steps=steps), source()
    torch.randn(x.shape, generator=drawn)
    return x, drawn


def along_its_grid(one, steps):
    """Return the flow's own samples, by its own times, from the pipeline's noise and draws."""
    times = one.times(steps)
    x, drawn = begun(one, steps)
    bound = one.given([PROMPT]).along(times)
    return bound, made(bound, x, times, drawn)


def off(found, wanted):
    return float((found - wanted).abs().max() / wanted.abs().max())


def like_the_pipelines(bound, x, wanted):
    """Return states in the layout in which the pipeline returns them."""
    z = bound.codec.grid_of(x)
    forms = [x, z, z.transpose(1, 2) if z.ndim == 5 else bound.codec.to_vae(x)]
    return min(
        (form.reshape(wanted.shape) for form in forms if form.numel() == wanted.numel()),
        key=lambda form: off(form, wanted),
    )


@pytest.mark.parametrize(("name", "on"), [c for c in CASES if c[0] not in (*SHORT, "sd15")])
def test_latents_and_pictures_are_the_pipelines(name, on):
    steps = STEPS.get(name, 4)
    bound, x = along_its_grid(flow(name, on=on), steps)
    latents = pipeline(name, on=on, steps=steps, output_type="latent")
    assert off(like_the_pipelines(bound, x, latents), latents) < 1e-5
    pictures = pipeline(name, on=on, steps=steps)
    with torch.no_grad():
        found = bound.frames(x).clamp(0, 1)
    found = found.transpose(1, 2) if found.ndim == 5 else found
    assert float((found.reshape(pictures.shape) - pictures).abs().max()) < 5e-6


@pytest.mark.parametrize(("name", "on"), [c for c in CASES if c[0] in SHORT])
def test_up_to_the_first_training_step(name, on):
    """`set_alpha_to_one=False`: the pipeline returns its state there, and we go on to the data."""
    one = flow(name, on=on)
    end = float(one._times_of_steps[0])
    times = [*one.times(4)[:-1], end]
    x, drawn = begun(one, 4)
    more = {"eta": 0.0} if name == "sdxl_tcd" else {}
    x = made(one.given([PROMPT]).along(one.times(4)), x, times, drawn)
    y = x / (end**2 + (1 - end) ** 2) ** 0.5
    latents = pipeline(name, on=on, steps=4, output_type="latent", **more)
    assert off(y, latents) < 1e-5


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_ddim_by_any_spacing_and_prediction(spacing, prediction):
    """Stable Diffusion by DDIM, whose step is the flow's."""
    built = tiny.build("sd15_ddim")
    built.scheduler = diffusers.DDIMScheduler.from_config(
        built.scheduler.config, timestep_spacing=spacing, prediction_type=prediction,
        set_alpha_to_one=True, clip_sample=False,
    )  # fmt: skip
    _, x = along_its_grid(seen_as(built, "sd15_ddim"), 4)
    latents = tiny.run(built, "sd15_ddim", steps=4, output_type="latent", guidance_scale=1.0)
    assert off(x, latents) < 1e-5


@pytest.mark.parametrize("name", ["sd15", "sdxl_turbo"])
def test_samplers_of_another_kind_give_their_times(name):
    """PNDM remembers several steps, ancestral Euler draws: we take their times alone."""
    one = flow(name)
    scheduler = type(one.source.pipe.scheduler).from_config(one.source.pipe.scheduler.config)
    scheduler.set_timesteps(4)
    steps = scheduler.timesteps.long().unique().flip(0)
    wanted = one._times_of_steps[steps].tolist()
    assert one.times(4)[1:-1] == pytest.approx(wanted[1:], abs=1e-6)


def test_sample_is_the_loop():
    """`steer.sample(..., method="none")` on the pipeline's own times."""
    one, prompts = flow("flux"), [PROMPT, "a fox"]
    seen = []
    result = steer.sample(
        one, lambda images: images.mean((1, 2, 3)), prompts=prompts, method="none", steps=3,
        particles=2, seed=5, callback=lambda population: seen.append(population.x),
    )  # fmt: skip
    x = made(one.given(prompts), seen[0].flatten(0, 1), one.times(3)[1:])
    torch.testing.assert_close(result.x.reshape(x.shape), x, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------ rows


@pytest.mark.parametrize(
    ("name", "on"), [c for c in CASES if c[1] or c[0] not in dict(CASES[1::2])]
)
def test_prompts_and_particles_in_a_batch_are_those_alone(name, on):
    """Also where the prompts' encodings have different lengths."""
    one = flow(name, on=on)
    prompts = ["a fox", "a very long prompt of a cat on a mat"]
    x = torch.randn(4, *one.event_shape, generator=source(1))
    with torch.no_grad():
        both = one.given(prompts).jump(x, 0.3, 0.8)
        alone = [
            one.given([prompt]).jump(x[i : i + 1], 0.3, 0.8)
            for i, prompt in enumerate(p for p in prompts for _ in range(2))
        ]
        decoded = one.decode(x)
        each = torch.cat([one.decode(x[i : i + 1]) for i in range(4)])
    assert off(both, torch.cat(alone)) < 2e-5
    assert off(decoded, each) < 2e-5
    assert off(both[:1], both[2:3]) > 1e-4


@pytest.mark.parametrize("name", [n for n, g in tiny.GUIDANCE.items() if g and n in FAMILIES])
def test_the_negative_prompt_leads_away(name):
    one = flow(name, on=True)
    if one.cfg is None:
        pytest.skip("a student that is told its scale")
    x = torch.randn(1, *one.event_shape, generator=source(1))
    with torch.no_grad():
        plain, led = (
            one.guided(one.cfg, negative).given([PROMPT]).jump(x, 0.3, 0.8)
            for negative in (None, "a blue dog")
        )
    assert off(led, plain) > 1e-5


@pytest.mark.parametrize("name", ["flux", "sdxl", "sana", "qwen_image", "z_image", "sd3"])
def test_other_sizes_are_the_pipelines_too(name):
    """Not square, and bound to nothing that was recorded at another size."""
    one = flow(name)
    tall = one.sized(2 * one.height, one.width)
    assert tall.event_shape != one.event_shape
    assert tall.sized(one.height, one.width).event_shape == one.event_shape
    bound, x = along_its_grid(tall, 2)
    with switched(pipe(name), name, False) as guidance:
        wanted = tiny.run(
            pipe(name), name, steps=2, height=tall.height, width=tall.width, **guidance
        )
    with torch.no_grad():
        assert float((bound.decode(x).clamp(0, 1) - wanted).abs().max()) < 5e-6


# ------------------------------------------------------------------ times


@pytest.mark.parametrize("name", FAMILIES)
def test_times_begin_at_noise_end_at_data_and_can_start_between(name):
    one = flow(name)
    for steps in (1, 2, 5):
        times = one.times(steps)
        assert times[0] == 0.0
        assert times[-1] == pytest.approx(1.0)
        assert all(a < b for a, b in pairwise(times))
    later = one.times(2, start=0.5)
    assert later[0] == 0.5
    assert later[-1] == pytest.approx(1.0)
    assert len(later) == 3


@pytest.mark.parametrize("name", FAMILIES)
def test_a_jump_to_where_it_is_stays(name):
    one = flow(name).given([PROMPT])
    x = torch.randn(2, *one.event_shape, generator=source(1))
    with torch.no_grad():
        for t in (0.0, 0.4, 1.0):
            assert torch.equal(one.jump(x, t, t), x)


@pytest.mark.parametrize("name", FAMILIES)
def test_times_of_rows(name):
    """A time for each row is that row's time."""
    one = flow(name).given([PROMPT])
    x = torch.randn(2, *one.event_shape, generator=source(1))
    s, t = torch.tensor([0.2, 0.5]), torch.tensor([0.6, 1.0])
    with torch.no_grad():
        both = one.jump(x, s, t)
        each = [one.jump(x[i : i + 1], float(s[i]), float(t[i])) for i in range(2)]
        v = one.velocity(x, s)
    assert off(both, torch.cat(each)) < 2e-5
    assert v.shape == x.shape


# ------------------------------------------------------------------ single lines


def test_states_of_doubles_get_times_of_doubles():
    assert rows_time(0.1, torch.zeros(2, 1, dtype=torch.float64)).dtype == torch.float64
    assert rows_time(0.1, torch.zeros(2, 1, dtype=torch.bfloat16)).dtype == torch.float32


def test_a_consistency_model_keeps_the_state_of_its_first_training_step():
    """Its boundary condition, `c_skip(0) = 1`, `c_out(0) = 0` (Luo et al. 2023, 2310.04378)."""
    one = flow("sdxl_lcm").given([PROMPT])
    x = torch.randn(1, *one.event_shape, generator=source(1))
    s = float(one._times_of_steps[0])
    with torch.no_grad():
        data = one.lookahead(x, s)
    y = x / (s**2 + (1 - s) ** 2) ** 0.5
    torch.testing.assert_close(data, y, rtol=1e-5, atol=1e-5)


def test_sprints_middle_time_is_for_two_steps():
    one = steer.load(pipe("sana_sprint"), height=32, width=32)
    told = {steps: one.arguments_of_call("a", steps) for steps in (0, 1, 2, 3)}
    given = {steps for steps, call in told.items() if "intermediate_timesteps" in call}
    assert given == {1, 3}
