"""The tiny pipelines run, say something, and say it again for the same seed."""

import pytest
import torch

from tests import tiny_pipelines as tiny


@pytest.mark.parametrize("name", tiny.NAMES)
def test_runs(name):
    before = torch.get_rng_state()
    pipe = tiny.build(name)
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(module.training for module in tiny.modules(pipe))
    assert all(weight.detach().any() for weight in tiny.denoiser(pipe).parameters())

    latents = tiny.run(pipe, name, output_type="latent")
    pictures = tiny.run(pipe, name)
    for made in (latents, pictures):
        assert made.isfinite().all()
        assert made.std() > 1e-3
    if name not in tiny.REFUSED:
        assert pictures.shape[-3] == 3
        assert 0 <= pictures.min() <= pictures.max() <= 1

    assert torch.equal(tiny.run(pipe, name, output_type="latent"), latents)
    for change in ({"seed": 1}, {"prompt": "a blue ball"}):
        other = tiny.run(pipe, name, output_type="latent", **change)
        assert (other - latents).norm() > 1e-3 * latents.norm()


@pytest.mark.parametrize("name", [name for name in tiny.NAMES if tiny.GUIDANCE[name]])
def test_guidance_switches(name):
    pipe = tiny.build(name)
    off, on = (
        tiny.run(pipe, name, output_type="latent", **tiny.guided(pipe, name, on=on))
        for on in (False, True)
    )
    assert (off - on).norm() > 1e-3 * off.norm()


def test_seeds():
    first, again, other = (
        torch.cat([weight.flatten() for weight in tiny.denoiser(pipe).parameters()])
        for pipe in (tiny.build("flux"), tiny.build("flux"), tiny.build("flux", seed=1))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("name", ["flux3_klein", "sdxl"])
def test_saved_and_loaded(name, tmp_path):
    saved = tiny.save(name, tmp_path)
    loaded = tiny.load(tmp_path)
    assert type(loaded) is type(saved)
    torch.testing.assert_close(
        tiny.run(loaded, name), tiny.run(saved, name), rtol=0, atol=1e-5
    )  # not to the bit: tensors mapped from a file are aligned otherwise
