"""Gradients through pipelines, in double and half precision, and with less memory."""

import warnings

import pytest
import torch

import steer
from steer.backends.pipeline import PipelineFlow
from tests import tiny_pipelines as tiny
from tests.test_backends_lora import trained
from tests.tiny_flows import FAMILIES, PROMPT, flow, seen_as, source

WIDE = {"krea2": 1e-3, "anyflow": 1e-3, "wan": 1e-2, "sana": 1e-2, "sana_sprint": 1e-2}
"""Relative bounds of those whose layers round to float32 or have kinks (ReLU, RMS norms)."""


def red(images):
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


def slope(one, x, t=0.4):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(red(one.decode(one.lookahead(x, t))).sum(), x)[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_gradient_is_that_of_central_differences(name):
    """Of a reward on the decoded lookahead, along a direction, in float64."""
    built = tiny.build(name)
    tiny.denoiser(built).double()
    built.vae.double()
    one = seen_as(built, name).given([PROMPT])
    x = torch.randn(1, *one.event_shape, generator=source(1), dtype=torch.float64)
    way = torch.randn(x.shape, generator=source(2), dtype=torch.float64)
    way /= way.norm()
    found = float((slope(one, x) * way).sum())
    h, bound = (1e-3, 1e-7) if hasattr(built, "unet") and name != "dreamlite" else (1e-2, 1e-4)
    bound = WIDE.get(name, bound)
    with torch.no_grad():
        up, down = (red(one.decode(one.lookahead(x + k * h * way, 0.4))) for k in (1, -1))
    wanted = float(up - down) / (2 * h)
    assert found != 0
    assert found == pytest.approx(wanted, rel=bound)


@pytest.mark.parametrize("name", FAMILIES)
def test_half_precision_is_finite(name):
    one = flow(name, dtype=torch.bfloat16).given([PROMPT])
    x = torch.randn(2, *one.event_shape, generator=source(1))
    with torch.no_grad():
        v, y = one.velocity(x, 0.4), one.jump(x, 0.2, 0.7)
        images = one.decode(y)
    assert v.dtype == y.dtype == images.dtype == torch.float32
    for found in (v, y, images, slope(one, x)):
        assert torch.isfinite(found).all()
    whole = flow(name).given([PROMPT])
    with torch.no_grad():
        assert torch.nn.functional.cosine_similarity(
            v.flatten(), whole.velocity(x, 0.4).flatten(), dim=0
        ) > 0.9  # fmt: skip


@pytest.mark.parametrize(
    "name",
    ["flux", "flux3_klein", "sdxl", "sana", "sana_sprint", "wan", "qwen_image", "hunyuan_image"],
)
def test_checkpointing_changes_neither_values_nor_gradients(name):
    plain, saving = flow(name).given([PROMPT]), flow(name, checkpointing=True).given([PROMPT])
    x = torch.randn(1, *plain.event_shape, generator=source(1))
    torch.testing.assert_close(saving.lookahead(x, 0.4), plain.lookahead(x, 0.4))
    torch.testing.assert_close(slope(saving, x), slope(plain, x))


@pytest.mark.parametrize("name", ["flux", "sdxl", "sana", "flux3_klein"])
def test_checkpointing_knows_which_scale_a_call_had(name):
    """Base and tuned calls in one graph, made again in the backward pass."""
    grown = []
    for saving in (False, True):
        tuned = trained(flow(name, checkpointing=saving))
        parameters = list(tuned.adapters().values())
        for p in parameters:
            p.requires_grad_()
        view = tuned.given([PROMPT])
        x = torch.randn(1, *view.event_shape, generator=source(1))
        loss = (view.jump(x, 0.2, 0.9) - 2 * view.base.jump(x, 0.2, 0.9)).square().mean()
        loss = loss + view.at(0.5).velocity(view.lookahead(x, 0.3), 0.5).square().mean()
        grown.append(torch.autograd.grad(loss, parameters, materialize_grads=True,
                                         allow_unused=True))  # fmt: skip
    for plain, saved in zip(*grown, strict=True):
        torch.testing.assert_close(saved, plain, rtol=1e-4, atol=1e-7)


def test_a_graph_that_is_kept_is_computed_again_each_time():
    one = flow("flux", checkpointing=True).given([PROMPT])
    x = torch.randn(1, *one.event_shape, generator=source(1)).requires_grad_()
    y = one.lookahead(x, 0.4).sum()
    first, second = (torch.autograd.grad(y, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", ["flux", "sdxl", "sana", "flux3_klein", "hunyuan_image"])
def test_checkpointing_keeps_the_inputs_of_blocks_alone(name):
    """Of denoiser and decoder; the rest is computed again."""
    kept = []
    for saving in (False, True):
        one = flow(name, checkpointing=saving).given([PROMPT])
        x = torch.randn(1, *one.event_shape, generator=source(1)).requires_grad_()
        sizes = []
        modules = one.network, one.vae
        own = {p.untyped_storage().data_ptr() for m in modules for p in m.parameters()}

        def pack(p, sizes=sizes, own=own):
            sizes.append(0 if p.untyped_storage().data_ptr() in own else p.numel())
            return p

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda p: p):
            y = one.lookahead(one.jump(x, 0.0, 0.5), 0.5)
            images = one.decode(y)
        kept.append(sum(sizes))
        images.sum().backward()
    assert kept[1] < 0.5 * kept[0], kept


@pytest.mark.parametrize("name", ["flux", "sana"])
def test_a_block_is_computed_again_alone(name):
    """One at a time, from the last to the first; and the pipeline is what it was."""
    one = flow(name, checkpointing=True).given([PROMPT])
    x = torch.randn(1, *one.event_shape, generator=source(1)).requires_grad_()
    calls = []
    blocks = next(m for m in one.network.modules() if isinstance(m, torch.nn.ModuleList))
    handles = [
        block.register_forward_pre_hook(lambda *a, k=k: calls.append(k))
        for k, block in enumerate(blocks)
    ]
    y = one.lookahead(x, 0.4)
    forward, calls[:] = list(calls), []
    y.sum().backward()
    for handle in handles:
        handle.remove()
    assert forward == list(range(len(blocks)))
    assert calls == forward[::-1]
    assert not any(getattr(m, "gradient_checkpointing", False) for m in one.network.modules())


# ------------------------------------------------------------------ FLUX.3 Klein, a true map


def test_a_part_of_a_checkpointed_block_does_not_checkpoint_itself(monkeypatch):
    """The middle of AutoencoderKL does, which torch 2.11 refuses in the backward pass."""
    from steer.backends import recomputing

    depth, deepest, plain = 0, 0, recomputing.checkpoint

    def counted(function, *args, **kwargs):
        nonlocal depth, deepest
        depth += 1
        deepest = max(deepest, depth)
        try:
            return plain(function, *args, **kwargs)
        finally:
            depth -= 1

    vae = tiny.build("flux").vae.requires_grad_(False)
    x = torch.randn(1, vae.config.latent_channels, 4, 4, requires_grad=True)
    (kept,) = torch.autograd.grad(vae.decode(x).sample.square().sum(), x)
    monkeypatch.setattr(recomputing, "checkpoint", counted)
    with recomputing.by_block(vae):
        loss = vae.decode(x).sample.square().sum()
    (again,) = torch.autograd.grad(loss, x)
    assert deepest == 1
    torch.testing.assert_close(again, kept)
    assert not vae.decoder.mid_block.gradient_checkpointing


def test_flux3_composes_as_its_training_would_have_it():
    """`X(u,t)` after `X(s,u)`: near `X(s,t)` for a trained map; of random weights it differs."""
    one = flow("flux3_klein").given([PROMPT])
    x = torch.randn(2, *one.event_shape, generator=source(1))
    with torch.no_grad():
        once = one.jump(x, 0.1, 0.9)
        twice = one.jump(one.jump(x, 0.1, 0.5), 0.5, 0.9)
        there = one.jump(x, 0.1, 0.1)
    assert torch.equal(there, x)
    gap = float((once - twice).norm() / (once - x).norm())
    print(f"X(.5,.9) after X(.1,.5) is {gap:.3f} of the jump away from X(.1,.9)")
    assert 0 < gap < 1


def test_flux3_knows_where_it_jumps_to():
    """The average velocity of two jumps from one state differs: the target time counts."""
    one = flow("flux3_klein").given([PROMPT])
    x = torch.randn(1, *one.event_shape, generator=source(1))
    with torch.no_grad():
        near, far = ((one.jump(x, 0.1, t) - x) / (t - 0.1) for t in (0.2, 0.9))
    assert float((near - far).abs().max() / far.abs().max()) > 1e-3


@pytest.mark.parametrize("name", ["flux3_klein", "anyflow", "hunyuan_image"])
def test_the_diagonal_is_the_velocity(name):
    """`(X(s, s+h, x) - x) / h -> b_s(x)`, and its call has equal times, as in training."""
    built = tiny.build(name)
    tiny.denoiser(built).double()
    one = seen_as(built, name).given([PROMPT])
    x = torch.randn(1, *one.event_shape, generator=source(1), dtype=torch.float64)
    seen = []
    network = one.network
    handle = network.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    with torch.no_grad():
        v = one.velocity(x, 0.3)
        handle.remove()
        gaps = [float(((one.jump(x, 0.3, 0.3 + h) - x) / h - v).abs().max()) for h in (0.2, 1e-6)]
    (call,) = seen
    target = one.target_argument
    assert torch.equal(call[one.time_argument].float(), call[target].float())
    assert gaps[1] < 1e-2 * gaps[0]


# ------------------------------------------------------------------ what is not the denoiser


@pytest.mark.parametrize("name", [n for n in FAMILIES if n not in ("wan", "anyflow")])
def test_pictures_are_encoded_and_come_back(name):
    one = flow(name)
    shape = one.decode(torch.zeros(1, *one.event_shape)).shape
    images = torch.rand(2, *shape[1:], generator=source(3))
    with torch.no_grad():
        x = one.encode(images)
        assert x.shape == (2, *one.event_shape)
        assert one.decode(x).shape == images.shape
        assert torch.isfinite(x).all()


def test_encode_is_the_autoencoders_mode_normalised():
    one = flow("sdxl")
    images = torch.rand(1, 3, one.height, one.width, generator=source(3))
    with torch.no_grad():
        mode = one.vae.encode(2 * images - 1).latent_dist.mode()
        torch.testing.assert_close(one.encode(images), mode * one.vae.config.scaling_factor)
        z = torch.randn(1, *one.event_shape, generator=source(4))
        codec = flow("flux").codec
        tokens = torch.randn(1, *flow("flux").event_shape, generator=source(4))
        again = codec.to_vae(tokens)
    assert again.shape[1] == flow("flux").vae.config.latent_channels
    assert z.shape == mode.shape


def test_a_clip_has_no_start_from_a_picture():
    one = flow("wan")
    with pytest.raises(NotImplementedError, match="leave the init image out"):
        one.encode(torch.rand(1, 3, one.height, one.width))


def test_a_frame_of_a_clip_is_chosen():
    clip = flow("wan").frames(torch.randn(1, *flow("wan").event_shape, generator=source(1)))
    x = torch.randn(1, *flow("wan").event_shape, generator=source(1))
    for frame in (0, clip.shape[2] - 1):
        one = flow("wan", frame=frame)
        torch.testing.assert_close(one.decode(x), one.frames(x)[:, :, frame])


# ------------------------------------------------------------------ a pair


def test_a_pair_has_the_velocity_of_one_and_the_jump_of_the_other():
    base, student = flow("sana"), flow("sana_sprint")
    pair = steer.Pair(base, student)
    bound = pair.given([PROMPT])
    x = torch.randn(1, *pair.event_shape, generator=source(1))
    with torch.no_grad():
        torch.testing.assert_close(bound.velocity(x, 0.4), base.given([PROMPT]).velocity(x, 0.4))
        torch.testing.assert_close(
            bound.lookahead(x, 0.4), student.given([PROMPT]).lookahead(x, 0.4)
        )
        torch.testing.assert_close(bound.decode(x), student.decode(x))
    assert pair.along([0.0, 1.0]) is pair
    assert bound is not pair
    result = steer.sample(
        pair, red, prompts=[PROMPT], method="fmtt", steps=3, particles=2, temperature=0.1, seed=0
    )
    assert torch.isfinite(result.images).all()


def test_a_pair_of_two_sizes_is_refused():
    pair = steer.Pair(flow("sana"), flow("sana_sprint").sized(64, 64))
    with pytest.raises(ValueError, match="one resolution, so give both the same height"):
        steer.sample(pair, red, prompts=[PROMPT], steps=2)


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def test_every_flow_is_one():
    assert all(isinstance(flow(name), PipelineFlow) for name in FAMILIES)


def test_a_block_s_own_forward_is_there_afterwards(monkeypatch):
    """Hooks of other libraries put a forward on the instance."""
    from steer.backends import recomputing

    blocks = torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)])
    model = torch.nn.Module()
    model.blocks = blocks
    monkeypatch.setitem(recomputing.BLOCKS, "Module", "blocks")
    own = blocks[0].forward = lambda x: torch.nn.Linear.forward(blocks[0], x) + 1
    x = torch.ones(1, 2, requires_grad=True)
    wanted = blocks[0](x)
    with recomputing.by_block(model):
        assert torch.equal(blocks[0](x), wanted)
    assert blocks[0].forward is own
    assert "forward" not in vars(blocks[1])
