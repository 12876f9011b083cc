"""Classifier-free guidance mixed at run time."""

import pytest
import torch

import steer
from tests.test_flow import mixture


class Shifted(steer.FlowMap):
    """A flow whose velocity and jumps are moved by the length of the prompt."""

    def __init__(self, length=0.0):
        super().__init__()
        self.exact, self.length = mixture(), torch.as_tensor(length)
        self.path, self.event_shape = self.exact.path, self.exact.event_shape

    def _moved(self, y):
        moved = steer.flow.per_row(self.length.reshape(-1, 1), len(y))
        return y + moved

    def velocity(self, x, t):
        return self._moved(self.exact.velocity(x, t))

    def jump(self, x, s, t):
        return self._moved(self.exact.jump(x, s, t))

    def given(self, prompts):
        return Shifted([float(len(p)) for p in prompts])


X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))


def test_it_mixes_velocities_and_jumps():
    flow = Shifted()
    mixed = steer.ClassifierFree(flow, 3.0, "no").given(["abcde", "a"])
    shift = torch.tensor([2 + 3 * (5 - 2), 2 + 3 * (1 - 2)]).repeat_interleave(2)[:, None]
    assert torch.allclose(mixed.velocity(X, 0.3), flow.velocity(X, 0.3) + shift, atol=1e-5)
    assert torch.allclose(mixed.jump(X, 0.3, 0.8), flow.jump(X, 0.3, 0.8) + shift, atol=1e-5)


def test_scale_one_is_the_prompts_own_flow_and_zero_the_negative_ones():
    flow = Shifted()
    own = steer.ClassifierFree(flow, 1.0, "xyz").given(["a"])
    assert torch.allclose(own.velocity(X, 0.3), flow.given(["a"]).velocity(X, 0.3), atol=1e-5)
    away = steer.ClassifierFree(flow, 0.0, "xyz").given(["a"])
    assert torch.allclose(away.jump(X, 0, 1), flow.given(["xyz"]).jump(X, 0, 1), atol=1e-5)


def test_every_call_costs_two():
    flow = steer.ClassifierFree(Shifted(), 2.0)
    result = steer.sample(flow, lambda x: x.sum(1), ["a"], 3, 4, "none")
    assert result.nfe == 8


class Integrated(Shifted):
    """A jump of this one takes three calls."""

    evaluations = 3

    def calls(self, name, *times):
        return 3 if name == "jump" else 1

    def given(self, prompts):
        return Integrated([float(len(p)) for p in prompts])


def test_it_counts_both_flows():
    flow = steer.ClassifierFree(Shifted(), 2.0)
    assert flow.evaluations == flow.given(["a"]).evaluations == 2
    assert flow.calls("velocity", 0.5) == 2
    flow = steer.ClassifierFree(Integrated(), 2.0)
    assert (flow.calls("velocity", 0.5), flow.calls("jump", 0.0, 1.0)) == (2, 6)
    assert flow.evaluations == flow.given(["a"]).evaluations == 6
    assert flow.around(Shifted(1.0)).evaluations == 2


def test_a_flow_without_prompts_is_refused():
    with pytest.raises(ValueError, match="GaussianMixture takes no prompts"):
        steer.ClassifierFree(mixture(), 2.0)


def test_the_embedded_model_takes_it():
    flow = steer.load("emoji")
    x = torch.randn(2, *flow.event_shape, generator=torch.Generator().manual_seed(0))
    mixed = steer.ClassifierFree(flow, 1.0).given(["fox"])
    assert torch.allclose(mixed.jump(x, 0, 1), flow.given(["fox"]).jump(x, 0, 1), atol=1e-4)
    image = torch.rand(2, 3, 32, 32)
    assert torch.allclose(mixed.decode(mixed.encode(image)), image, atol=1e-6)
