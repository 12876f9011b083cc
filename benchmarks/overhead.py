"""The overhead of a step of each method over the calls that it counts.

The time inside the network, the decoder, the reward and `torch.autograd.grad` is measured in the
run itself, so both parts of the ratio are measured at the same time, regardless of other load.

    python -m benchmarks.overhead
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import rewards
import steer
from steer.flow import FlowMap, Wrapped
from steer.path import Time
from steer.sampling.methods import TABLE


class Clock:
    """Seconds inside calls; nested calls count once."""

    def __init__(self) -> None:
        self.inside, self._depth = 0.0, 0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the time of a block."""
        began = time.perf_counter()
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if not self._depth:
                self.inside += time.perf_counter() - began


class Timed(Wrapped):
    """A flow whose calls are timed."""

    def __init__(self, flow: FlowMap, clock: Clock) -> None:
        super().__init__(flow)
        self.clock = clock

    def call(self, name: str, x: Tensor, *times: Time) -> Tensor:
        """Time a call of the network."""
        with self.clock.running():
            return super().call(name, x, *times)

    def decode(self, x: Tensor) -> Tensor:
        """Time the decoder."""
        with self.clock.running():
            return super().decode(x)


class TimedReward(steer.Reward):
    """A reward whose calls are timed."""

    def __init__(self, reward: steer.Reward, clock: Clock) -> None:
        super().__init__()
        self.reward, self.clock, self.differentiable = reward, clock, reward.differentiable

    def forward(self, images: Tensor, prompts: Any = None, metadata: Any = None) -> Tensor:
        """Time a call."""
        with self.clock.running():
            return self.reward(images, prompts, metadata)


@contextmanager
def timed_gradients(clock: Clock) -> Iterator[None]:
    """Time `torch.autograd.grad`."""
    plain: Callable[..., Any] = torch.autograd.grad

    def grad(*args: Any, **kwargs: Any) -> Any:
        with clock.running():
            return plain(*args, **kwargs)

    torch.autograd.grad = grad
    try:
        yield
    finally:
        torch.autograd.grad = plain


def ratio(method: str, particles: int, steps: int, model: str, spec: str) -> float:
    """Return the median over steps of a step's time divided by that of its calls."""
    clock = Clock()
    flow, reward = Timed(steer.load(model), clock), TimedReward(rewards.load(spec), clock)
    more = {"temperature": 0.05} if TABLE[method].weighted else {}
    found = []
    with timed_gradients(clock):
        stream = steer.stream(
            flow, reward, ["a red apple"], particles=particles, steps=steps, method=method, **more
        )
        began, before = time.perf_counter(), clock.inside
        for k, _ in enumerate(stream):
            now = time.perf_counter()
            inside = clock.inside - before
            if k and inside > 0:  # the first step includes the start
                found.append((now - began) / inside)
            began, before = time.perf_counter(), clock.inside
    return statistics.median(found)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--particles", type=int, default=16)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--reward", default="clip")
    given = parser.parse_args()
    print("| method | a step over its calls |\n|---|---|")
    for name in steer.METHODS:
        found = ratio(name, given.particles, given.steps, given.model, given.reward)
        print(f"| `{name}` | {found:.3f} |", flush=True)


if __name__ == "__main__":
    main()
