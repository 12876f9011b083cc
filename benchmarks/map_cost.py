"""Cost of a training step of a map, relative to its forward and backward passes by hand.

`python -m benchmarks.map_cost` prints the median ratio of interleaved steps, with quartiles: the
embedded model's network, rule psd-m from data, batches of 16. Both take the same optimizer step
and update the same running average; the step goes through `FlowTraining` and `MapObjective`.
"""

import copy
import statistics
import time
from types import SimpleNamespace

import torch

import steer
from steer.path import like
from steer.training.average import follow
from steer.training.module import FlowTraining
from steer.training.optim import MuonAdamW
from steer.training.rules import MapObjective, build, draw_pair, draw_time

__all__ = ["main"]

NAMES = ["red fox", "owl", "banana", "face"] * 4


def by_hand(flow, average, optimizer, x_1, generator):
    """Take one step of psd-m, written out."""
    n, k = len(x_1), len(x_1) // 2
    x_0 = torch.randn(x_1.shape, generator=generator)
    tau, (s, t) = draw_time(k, generator), draw_pair(n - k, generator)
    time_ = torch.cat([tau, s])
    x = like(1 - time_, x_1) * x_0 + like(time_, x_1) * x_1
    net, mean = flow.network, average.network
    on, off = flow.given(NAMES[:k]), flow.given(NAMES[k:])
    text = [f._encoded(net.text, x.device) for f in (on, off)]
    diagonal = net(x[:k], tau, tau, text[0]) - (x_1 - x_0)[:k]
    u = (s + t) / 2
    with torch.no_grad():
        words = off._encoded(mean.text, x.device)
        first = mean(x[k:], s, u, words)
        second = mean(x[k:] + like(u - s, first) * first, u, t, words)
    error = net(x[k:], s, t, text[1]) - (first + second) / 2
    loss = torch.cat([diagonal, error]).square().flatten(1).mean(1).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    follow(average.parameters(), flow.parameters(), 0.99, 1000)


def main(rounds: int = 25) -> None:
    """Print the ratio."""
    torch.manual_seed(0)
    base = steer.load("emoji").requires_grad_(True)
    x_1 = torch.rand(16, *base.event_shape) * 2 - 1
    ours = FlowTraining(
        copy.deepcopy(base), MapObjective(build("psd-m")), lambda k: (x_1, NAMES), steps=10**6,
        average=0.99,
    )  # fmt: skip
    ours.log_dict = lambda *args, **kwargs: None  # belongs to a logger, not to the step
    ours._trainer = SimpleNamespace(world_size=1, global_step=1000)
    type(ours).global_step = property(lambda self: 1000)
    type(ours).global_rank = property(lambda self: 0)
    type(ours).trainer = property(lambda self: self._trainer)
    hand, mean = copy.deepcopy(base), copy.deepcopy(base)
    optimizers = [MuonAdamW(f.parameters()) for f in (ours.flow, hand)]

    def step(k: int) -> None:
        loss = ours.training_step(None, 0)
        optimizers[0].zero_grad()
        loss.backward()
        optimizers[0].step()
        follow(ours.average.parameters(), ours.flow.parameters(), 0.99, 1000)

    ratios = []
    for k in range(rounds):
        generator = torch.Generator().manual_seed(k)
        seconds = []
        for ours_now in (True, False):
            begun = time.perf_counter()
            if ours_now:
                step(k)
            else:
                by_hand(hand, mean, optimizers[1], x_1, generator)
            seconds.append(time.perf_counter() - begun)
        if k > 1:
            ratios.append(seconds[0] / seconds[1])
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(f"training step / by hand: {middle:.3f} ({low:.3f} to {high:.3f})")


if __name__ == "__main__":
    main()
