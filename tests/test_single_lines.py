"""Single lines whose change no test of their own file noticed, each against its formula."""

import pytest
import torch

import steer
from steer.guidance.ascent import whole_reward
from steer.noise import Noise
from steer.objectives.policy import advantages
from steer.objectives.regression import velocity_loss
from steer.reward import wrap


class Still(steer.FlowMap):
    """A flow whose velocity is one, on a path of one's own choice."""

    def __init__(self):
        super().__init__()
        self.path, self.event_shape = steer.Linear(), (2,)

    def velocity(self, x, t):
        return torch.ones_like(x)

    def jump(self, x, s, t):
        return x + (t - s)


def test_advantages_are_in_standard_deviations_within_groups():
    """`(R - mean of its group) / sigma`, sigma² over all groups with n - groups in place of n."""
    found, sigma = advantages(torch.tensor([1.0, 3.0, 10.0, 14.0]), 2)
    assert float(sigma) == pytest.approx(5**0.5)
    torch.testing.assert_close(found, torch.tensor([-1.0, 1.0, -2.0, 2.0]) / 5**0.5)


def test_the_velocitys_loss_is_of_the_paths_slope():
    """`|b - (alpha' x_0 + beta' x_1)|²` with `alpha' = -1`, `beta' = 1`."""
    x_0, x_1 = torch.tensor([[1.0, 2.0]]), torch.tensor([[4.0, 8.0]])
    loss = velocity_loss(Still(), x_0, x_1, torch.tensor([0.3]))
    torch.testing.assert_close(loss, torch.tensor([((1 - 3) ** 2 + (1 - 6) ** 2) / 2.0]))


def test_a_run_settles_by_the_jump_to_the_end():
    flow = Still()
    x = torch.tensor([[1.0, 2.0]])
    potential = steer.Terminal(flow, wrap(lambda y: y[:, 0]))
    y, ratio = steer.Sde(flow, settle=True).propose(
        x, 0.75, 1.0, potential, 0.0, Noise(0, particles=1)
    )
    torch.testing.assert_close(y, x + 0.25)
    assert not ratio.any()


def test_the_whole_reward_is_neither_ramped_nor_divided():
    flow = Still()
    seen = whole_reward(flow, wrap(lambda y: y[:, 0]), None).evaluate(
        torch.tensor([[1.0, 2.0]]), 0.25
    )
    torch.testing.assert_close(seen.value.float(), torch.tensor([1.75]))


def test_nothing_is_seen_in_single_precision_at_least():
    potential = steer.Terminal(Still(), wrap(lambda y: y[:, 0]))
    seen = potential.evaluate(torch.zeros(2, 2, dtype=torch.bfloat16), 0.5)
    assert seen.reward.dtype == torch.float32
    assert seen.reward.isnan().all()
