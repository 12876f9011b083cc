"""What a run holds does not grow with its steps: every method, counted byte by byte."""

import gc

import pytest
import torch

import steer
from steer.flow import FlowMap
from steer.path import Linear, like
from steer.planning.live import Live
from steer.sampling.methods import TABLE

EVENT = (3, 32, 32)


class Net(FlowMap):
    """A small network, of which nothing is known in closed form."""

    def __init__(self):
        super().__init__()
        self.path, self.event_shape = Linear(), EVENT
        torch.manual_seed(0)
        self.layers = torch.nn.Conv2d(3, 3, 3, padding=1)

    def velocity(self, x, t):
        return self.layers(x) - x

    def jump(self, x, s, t):
        return x + like(torch.as_tensor(t) - torch.as_tensor(s), x) * self.velocity(x, s)


def bright(images):
    return images.mean((1, 2, 3))


def peak(method, steps):
    """The most bytes that are alive while a population of 8 is carried, the result apart."""
    flow = Net()
    more = {"temperature": 0.1} if TABLE[method].weighted else {}
    stream = steer.stream(flow, bright, None, particles=8, steps=steps, method=method, **more)
    gc.collect()
    with Live().hold(flow) as live:
        for _ in stream:
            pass
    return live.peak


@pytest.mark.parametrize("method", steer.METHODS)
def test_memory_does_not_grow_with_the_steps(method):
    few, many = peak(method, 4), peak(method, 16)
    assert many <= 1.05 * few, (few, many)
