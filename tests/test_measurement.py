"""Inverse problems as rewards, against Bayes' rule for normal pictures."""

import pytest
import torch

import rewards
import steer
from rewards.pixels.measurement import Deblurring, Inpainting, SuperResolution, gaussian_blur
from steer.flow import Wrapped

SIDE, D = 4, 48


class Pictures(Wrapped):
    """A mixture whose samples are shown as pictures."""

    def decode(self, x):
        return x.reshape(-1, 3, SIDE, SIDE)


def prior():
    """Smooth normal pictures, so that what is measured tells of what is not; all within [0, 1]."""
    place = torch.stack(torch.meshgrid(*[torch.arange(SIDE)] * 2, indexing="ij"), -1).reshape(
        -1, 2
    )
    near = torch.exp(-(torch.cdist(place.double(), place.double()) ** 2) / 4)
    cov = torch.block_diag(near, near, near) * 0.01 + 1e-5 * torch.eye(D)
    return steer.GaussianMixture(torch.full((1, D), 0.5, dtype=torch.float64), cov[None])


def problems():
    g = torch.Generator().manual_seed(0)
    truth = prior().sample(1, g).reshape(3, SIDE, SIDE).float()
    mask = torch.zeros(SIDE, SIDE)
    mask[:, :2] = 1
    return {
        "inpaint": Inpainting(truth, mask, sd=0.05),
        "upscale": SuperResolution(truth, 2, sd=0.03),
        "deblur": Deblurring(truth, 0.7, sd=0.05),
    }


def bayes(reward):
    """Mean and covariance of `p(x | y)`, and `log E_p exp(reward)`."""
    flow = prior()
    eye = torch.eye(D).reshape(D, 3, SIDE, SIDE)
    a = reward.operator(eye).flatten(1).T.double()
    y = reward.measured(eye[:1]).flatten().double()
    mean, cov = flow.means[0].double(), flow.covariances[0].double()
    total = a @ cov @ a.T + reward.sd**2 * torch.eye(len(y))
    gain = cov @ a.T @ torch.linalg.inv(total)
    gap = y - a @ mean
    # the likelihood without its constant, integrated over the prior
    log_z = -0.5 * gap @ torch.linalg.solve(total, gap)
    log_z = log_z - 0.5 * torch.logdet(total) + len(y) * torch.log(torch.tensor(reward.sd))
    return mean + gain @ gap, cov - gain @ a @ cov, log_z


@pytest.mark.parametrize("name", ["inpaint", "upscale", "deblur"])
def test_noise_smc_samples_the_posterior(name):
    reward = problems()[name]
    mean, cov, log_z = bayes(reward)
    result = steer.sample(
        Pictures(prior()), reward, ["a"] * 4, particles=1024, steps=30, method="noise-smc",
        temperature=1.0, moves=2, seed=1,
    )  # fmt: skip
    w = result.log_w.softmax(1)
    found = (w[..., None] * result.x.reshape(4, -1, D)).sum(1)
    assert ((found.mean(0) - mean).abs() < 5 * found.std(0) / 2 + 0.01).all()
    assert float((found.mean(0) - mean).norm() / (prior().means[0] - mean).norm()) < 0.15
    gap = result.x.reshape(4, -1, D) - mean
    spread = (w[..., None] * gap.square()).sum(1).mean(0)
    assert float((spread / cov.diagonal()).log().abs().mean()) < 0.2
    assert abs(float(result.log_z.mean()) - float(log_z)) < 0.5


def test_dps_comes_near_it():
    reward = problems()["inpaint"]
    mean, _, _ = bayes(reward)
    options = {"particles": 64, "steps": 30, "temperature": 1.0}
    guided = steer.sample(Pictures(prior()), reward, "a", method="dps", **options).x
    plain = steer.sample(Pictures(prior()), reward, "a", method="none", particles=64, steps=30).x
    near, far = ((x.reshape(-1, D).mean(0) - mean).norm() for x in (guided, plain))
    assert float(near) < 0.5 * float(far)


def test_what_is_measured():
    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(8, 8)
    mask[0, 0] = 1
    other = x[0].clone()
    other[:, 1:, :] = 0
    assert float(Inpainting(x[0], mask)(other[None])) == 0  # the known pixel agrees
    assert float(SuperResolution(x[0], 4)(x[:1])) == pytest.approx(0, abs=1e-6)
    small = torch.nn.functional.avg_pool2d(x[:1], 4)
    assert float(SuperResolution(small[0], 4)(x[:1])) == pytest.approx(0, abs=1e-6)
    blurred = gaussian_blur(x[:1], 1.0)
    assert float(Deblurring(blurred[0], 1.0, blurred=True)(x[:1])) == pytest.approx(0, abs=1e-6)
    off = SuperResolution(x[0], 4, sd=0.1)(x[:1] * 0.9)
    assert float(off) == pytest.approx(
        -float((0.1 * small).square().sum()) / (2 * 0.1**2), rel=1e-4
    )


def test_they_are_rewards_by_name(tmp_path):
    from torchvision.utils import save_image

    save_image(torch.rand(3, 8, 8), tmp_path / "a.png")
    save_image(torch.ones(3, 8, 8), tmp_path / "mask.png")
    x = torch.rand(2, 3, 8, 8)
    for text in (
        f"inpaint:image={tmp_path / 'a.png'},mask={tmp_path / 'mask.png'}",
        f"upscale:image={tmp_path / 'a.png'},factor=2,sd=0.2",
        f"deblur:image={tmp_path / 'a.png'},width=1.5",
    ):
        assert rewards.load(text)(x, None).shape == (2,)
    with pytest.raises(ValueError, match="sd"):
        rewards.load(f"deblur:image={tmp_path / 'a.png'},sd=0")
    with pytest.raises(ValueError, match="factor"):
        rewards.load(f"upscale:image={tmp_path / 'a.png'},factor=1")
    with pytest.raises(ValueError, match="divide"):
        rewards.load(f"upscale:image={tmp_path / 'a.png'},factor=3")(x, None)
    with pytest.raises(FileNotFoundError):
        rewards.load("deblur:image=nowhere.png")


def test_a_grey_pixel_counts_once():
    """For a model of one colour, whose three channels are one number."""
    x = torch.rand(2, 1, 8, 8).expand(-1, 3, -1, -1)
    y, mask = torch.rand(1, 8, 8).expand(3, -1, -1), torch.ones(8, 8)
    for make in (
        lambda **k: Inpainting(y, mask, 0.2, **k),
        lambda **k: SuperResolution(y, 4, 0.2, **k),
        lambda **k: Deblurring(y, 1.0, 0.2, **k),
    ):
        torch.testing.assert_close(3 * make(grey=True)(x), make()(x))
    with pytest.raises(ValueError, match="fewer than the 4x4 squares"):
        SuperResolution(torch.rand(3, 2, 2), 2)(torch.rand(1, 3, 8, 8))
