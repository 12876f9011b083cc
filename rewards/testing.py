"""Tests that every reward should pass: inherit them in your tests.

from rewards.testing import RewardContract

class TestMine(RewardContract):
    def create_reward(self):
        return Mine()
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from steer.reward import Reward

__all__ = ["RewardContract"]


class RewardContract:
    """The tests: subclass it, define `create_reward`, and `prompts` if the reward needs them."""

    n = 5
    tolerance = 1e-5
    """How far the scores of one picture may differ between batches."""

    def create_reward(self) -> Reward:
        """Return the reward under test."""
        raise NotImplementedError("abstract: return your reward")

    def prompts(self) -> Sequence[str] | None:
        """Return n prompts, or None."""
        return None

    def images(self) -> Tensor:
        """Return n images (n, 3, h, w) in [0, 1]: smooth ones with some noise."""
        g = torch.Generator().manual_seed(0)
        coarse = torch.rand(self.n, 3, 4, 4, generator=g)
        smooth = torch.nn.functional.interpolate(coarse, (32, 32), mode="bilinear")
        return (0.9 * smooth + 0.1 * torch.rand(smooth.shape, generator=g)).clamp(0, 1)

    def test_one_finite_number_per_image(self) -> None:
        """Shape (n,), floating, finite, and not the same for all."""
        scores = self.create_reward()(self.images(), self.prompts())
        assert scores.shape == (self.n,)
        assert scores.is_floating_point()
        assert torch.isfinite(scores).all()
        assert scores.std() > 0, "the reward gives all pictures the same score"

    def test_deterministic(self) -> None:
        """Twice the same call, twice the same scores."""
        reward = self.create_reward()
        a, b = (reward(self.images(), self.prompts()) for _ in range(2))
        assert torch.equal(a, b)

    def test_batch_size_does_not_matter(self) -> None:
        """A picture's score does not depend on its batch."""
        reward, images, prompts = self.create_reward(), self.images(), self.prompts()
        whole = reward(images, prompts)
        for i in range(self.n):
            alone = reward(images[i : i + 1], None if prompts is None else [prompts[i]])
            assert abs(float(alone[0] - whole[i])) <= self.tolerance * (1 + abs(float(whole[i])))

    def test_gradient_if_and_only_if_declared(self) -> None:
        """The scores carry a finite gradient that is not zero, or none at all."""
        reward, images = self.create_reward(), self.images().requires_grad_()
        scores = reward(images, self.prompts())
        assert scores.requires_grad == reward.differentiable
        if reward.differentiable:
            (gradient,) = torch.autograd.grad(scores.sum(), images)
            assert torch.isfinite(gradient).all()
            assert (gradient.flatten(1).norm(dim=1) > 0).all()

    def test_gradient_agrees_with_finite_differences(self) -> None:
        """Along a random direction, in the interior of [0, 1]."""
        reward = self.create_reward()
        if not reward.differentiable:
            return
        reward = copy.deepcopy(reward).double()
        x = (0.2 + 0.6 * self.images().double()).requires_grad_()
        v = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
        (gradient,) = torch.autograd.grad(reward(x, self.prompts()).sum(), x)
        with torch.no_grad():
            h = 1e-5
            up, down = (reward(x + d * h * v, self.prompts()).double() for d in (1, -1))
        slope, along = (up - down) / (2 * h), (gradient * v).flatten(1).sum(1)
        assert torch.allclose(slope, along, rtol=1e-2, atol=1e-3 * float(along.abs().max()))

    def test_images_out_of_range_keep_their_gradient(self) -> None:
        """Scored as if clamped to [0, 1], with the gradient passed through."""
        reward = self.create_reward()
        wild = 3 * self.images() - 1
        clamped = reward(wild.clamp(0, 1), self.prompts())
        assert torch.allclose(reward(wild, self.prompts()), clamped, atol=1e-5)
        if reward.differentiable:
            wild.requires_grad_()
            (gradient,) = torch.autograd.grad(reward(wild, self.prompts()).sum(), wild)
            assert float(gradient[(wild < 0) | (wild > 1)].abs().sum()) > 0

    def test_moves_and_copies(self) -> None:
        """A deep copy gives the same scores; in float64 nearly so, with a gradient if declared."""
        reward = self.create_reward()
        expected = reward(self.images(), self.prompts())
        other = copy.deepcopy(reward)
        assert torch.equal(other(self.images(), self.prompts()), expected)
        moved = other.to(torch.float64)(self.images().double(), self.prompts())
        assert torch.allclose(moved.float(), expected, atol=1e-3, rtol=1e-3)

    def test_parameters_stay_untrained(self) -> None:
        """Guidance and tuning never train the reward."""
        assert not any(p.requires_grad for p in self.create_reward().parameters())
