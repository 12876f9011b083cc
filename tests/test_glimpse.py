"""Cheaper pictures for the gradient: less is kept, and what is returned is decoded in full."""

import pytest
import torch

import steer
from steer.planning.live import saved_bytes
from tests.test_backends_gradient import red
from tests.tiny_flows import PROMPT, flow, source

diffusers = pytest.importorskip("diffusers")

CHEAPER = [{"guide_size": 0.5}, {"guide_crop": 8}, {"decode_rows": 1}]
NAMES = ["flux", "sdxl", "sana_sprint", "flux3_klein", "wan"]


def states(one, rows=2, seed=1):
    return torch.randn(rows, *one.event_shape, generator=source(seed))


def tiny(channels=4, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return diffusers.AutoencoderTiny(
            encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
            num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1), latent_channels=channels,
        ).eval()  # fmt: skip


def slope(one, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(red(one.decode(x)).sum(), x)[0]


@pytest.mark.parametrize("cheaper", CHEAPER, ids=lambda c: next(iter(c)))
@pytest.mark.parametrize("name", NAMES)
def test_pictures_are_whole_and_the_gradient_is_that_of_what_was_decoded(name, cheaper):
    one, whole = flow(name, **cheaper).given([PROMPT]), flow(name).given([PROMPT])
    x = states(one)
    with torch.no_grad():
        assert torch.equal(one.decode(x), whole.decode(x))
    with_gradient = one.decode(x.clone().requires_grad_())
    if "guide_crop" in cheaper:
        assert with_gradient.shape[-2:] == (8, 8)
    else:
        assert with_gradient.shape == whole.decode(x).shape
    if "decode_rows" in cheaper:
        torch.testing.assert_close(slope(one, x), slope(whole, x))
    else:
        assert not torch.allclose(slope(one, x), slope(whole, x))
    assert torch.isfinite(slope(one, x)).all()
    assert float(slope(one, x).norm()) > 0


@pytest.mark.parametrize("cheaper", [*CHEAPER, {"guide_vae": True}], ids=lambda c: next(iter(c)))
def test_less_is_kept_for_the_backward_pass(cheaper):
    given = {"guide_vae": tiny()} if "guide_vae" in cheaper else cheaper
    one, whole = flow("sdxl", **given), flow("sdxl")

    def kept(which):
        x = states(which, 4).requires_grad_()
        return saved_bytes(lambda: which.decode(x), which.parameters())

    assert kept(one) < 0.45 * kept(whole)


def test_a_half_size_is_the_picture_of_averaged_latents_enlarged():
    one, whole = flow("sdxl", guide_size=0.5), flow("sdxl")
    x = states(one)
    small = whole.codec.decode(torch.nn.functional.avg_pool2d(x, 2))
    wanted = torch.nn.functional.interpolate(small, scale_factor=2, mode="bilinear")
    torch.testing.assert_close(one.decode(x.clone().requires_grad_()), wanted)


def test_a_crop_is_of_the_middle():
    one, whole = flow("sdxl", guide_crop=8), flow("sdxl")
    x = states(one, 1)
    edge = x.clone()
    edge[:, :, 0] += 5.0  # outside of the middle
    inside, moved = (one.decode(z.requires_grad_()).detach() for z in (x, edge))
    assert torch.equal(inside, moved)
    assert not torch.allclose(whole.decode(x.detach()), whole.decode(edge.detach()))


def test_a_run_is_guided_cheaply_and_draws_in_full():
    one, whole = flow("flux", guide_size=0.5), flow("flux")
    options = {"prompts": [PROMPT], "method": "fmtt", "particles": 2, "steps": 3,
               "temperature": 0.05, "seed": 1}  # fmt: skip
    cheap, dear = steer.sample(one, red, **options), steer.sample(whole, red, **options)
    with torch.no_grad():
        torch.testing.assert_close(cheap.images[0], whole.decode(cheap.x[0]))
    torch.testing.assert_close(cheap.rewards[0], red(cheap.images[0].clamp(0, 1)))
    assert not torch.allclose(cheap.x, dear.x), "the gradient is another"


def test_a_tiny_autoencoder_guides_and_is_left_out_of_pictures(tmp_path):
    small = tiny()
    small.save_pretrained(tmp_path / "tiny")
    live, read = flow("flux", guide_vae=small), flow("flux", guide_vae=str(tmp_path / "tiny"))
    x = states(live)
    torch.testing.assert_close(slope(live, x), slope(read, x))
    with torch.no_grad():
        assert torch.equal(live.decode(x), flow("flux").decode(x))
    assert "guide_vae" not in dict(live.named_modules()), "it is no part of the model"


def test_a_tiny_autoencoder_of_other_weights_is_refused(tmp_path):
    import safetensors.torch

    tiny().save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = safetensors.torch.load_file(file)
    safetensors.torch.save_file({**weights, "decoder.mid.norm.weight": torch.ones(3)}, file)
    with pytest.raises(ValueError, match=r"no place.*would decode wrongly"):
        flow("flux", guide_vae=str(tmp_path))


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"guide_size must be 1, 0\.5 or 0\.25, got 0\.3"):
        flow("flux", guide_size=0.3)
    with pytest.raises(ValueError, match="decode_rows must be at least 1"):
        flow("flux", decode_rows=0)
    with pytest.raises(ValueError, match="guide_vae must have decode"):
        flow("flux", guide_vae=torch.nn.Linear(1, 1))
    one = flow("flux", guide_vae=tiny(channels=8))
    with pytest.raises(ValueError, match="latents of 8 channels, and this pipeline's have 4"):
        slope(one, states(one))
