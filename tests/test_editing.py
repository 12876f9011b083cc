"""Editing by inversion: back to where a picture came from, and on, guided elsewhere."""

import pytest
import torch

import steer
from steer.sampling.start import inverted
from tests.test_oracle import problem


class Pictures(steer.flow.Wrapped):
    """A mixture in three numbers, shown as a pixel."""

    def decode(self, x):
        return (x / 8 + 0.5).reshape(-1, 3, 1, 1)

    def encode(self, images):
        return 8 * (images.reshape(-1, 3) - 0.5)


def flow():
    means = torch.tensor([[-1.5, 0.0, 0.5], [1.5, 0.5, 0.0]])
    return Pictures(steer.GaussianMixture(means, 0.3))


def redness(images):
    return 8 * images[:, 0].flatten(1).mean(1)


def picture():
    return torch.tensor([0.35, 0.5, 0.55]).reshape(3, 1, 1)


@pytest.mark.parametrize("t", [0.0, 0.3])
def test_the_inverse_leads_back(t):
    mixture = problem(2, "linear")[0]
    x = mixture.sample(32, torch.Generator().manual_seed(0)).float()
    errors = []
    for steps in (8, 16, 32):
        back = inverted(mixture, x, t, steps)
        errors.append(float((mixture.jump(back, t, 1.0) - x).square().mean().sqrt()))
    assert errors[-1] < 0.02
    assert errors[0] / errors[2] > 8  # of second order


@pytest.mark.parametrize(
    "path",
    [steer.Linear(), steer.Cosine(), steer.VariancePreserving()],
    ids=lambda p: type(p).__name__,
)
def test_the_inverse_is_there_on_every_path(path):
    """Also where the velocity is infinite at t = 1."""
    means = torch.tensor([[-1.5, 0.0, 0.5], [1.5, 0.5, 0.0]])
    mixture = steer.GaussianMixture(means, 0.3, path=path)
    x = mixture.sample(16, torch.Generator().manual_seed(0)).float()
    back = inverted(mixture, x, 0.2, 32)
    assert float((mixture.jump(back, 0.2, 1.0) - x).square().mean().sqrt()) < 0.06


def test_a_temperature_is_found_beside_an_inverted_start():
    options = {"particles": 2, "steps": 3, "init_image": picture(), "init_time": 0.2}
    made = steer.sample(flow(), redness, None, method="renoise", init_by="inversion", **options)
    assert float(made.temperature) > 0
    assert made.costs["inversion_nfe_per_prompt"] == 32


def test_without_guidance_the_same_picture_comes_out():
    options = {"particles": 2, "steps": 4, "init_image": picture(), "init_time": 0.2}
    same = steer.sample(flow(), redness, None, method="none", init_by="inversion", **options)
    assert torch.allclose(same.images, picture().expand(2, 3, 1, 1), atol=0.01)
    assert same.costs["inversion_nfe_per_prompt"] == 32
    noisy = steer.sample(flow(), redness, None, method="none", **options)
    assert not torch.allclose(noisy.images, picture().expand(2, 3, 1, 1), atol=0.02)
    edited = steer.sample(flow(), redness, None, method="fmrg-j", init_by="inversion", **options)
    assert float(edited.rewards.mean()) > float(same.rewards.mean()) + 0.1
    far, near = ((r.images - picture()).norm() for r in (noisy, edited))
    assert float(near) < float(far)  # an edit keeps what a draw from noise does not


def test_prompts_have_a_picture_each_and_a_start_of_their_own():
    two = torch.stack([picture(), picture().flip(0)])
    done = steer.sample(
        flow(), redness, ["a", "b"], 2, 4, "none", init_image=two, init_by="inversion"
    )
    assert torch.allclose(done.images, two[:, None].expand(2, 2, 3, 1, 1), atol=0.01)


def test_what_cannot_be_inverted_is_refused():
    with pytest.raises(ValueError, match="give init_image"):
        steer.sample(flow(), redness, None, init_by="inversion")
    with pytest.raises(ValueError, match="did you mean inversion"):
        steer.sample(flow(), redness, None, init_image=picture(), init_by="inversoin")


@pytest.mark.parametrize(
    ("method", "evidence"), [("renoise", True), ("split", False), ("fmtt", False)]
)
def test_from_a_picture_there_is_log_z_where_weights_do_not_assume_the_model_s_law(
    method, evidence
):
    options = {"particles": 4, "steps": 3, "temperature": 0.5, "method": method}
    told = steer.sample(flow(), redness, None, init_image=picture(), init_time=0.4, **options)
    assert (told.log_z is not None) == evidence
    assert steer.sample(flow(), redness, None, **options).log_z is not None
