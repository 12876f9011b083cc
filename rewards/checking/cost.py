"""Checks of cost: milliseconds and megabytes per picture."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from rewards.checking.bench import Bench, ask
from rewards.checking.report import Seen
from steer.devices import differentiating

__all__ = ["memory", "speed"]


def speed(bench: Bench) -> Seen:
    """Time one picture and all of them, without and with the gradient."""
    figures = {}
    n = len(bench.images)
    for rows in (1, n):
        x = bench.images[:rows]
        figures[f"ms_of_{rows}"] = _timed(bench, partial(bench.scores, x)) / rows
        if bench.ok("differentiable") and bench.reward.differentiable:
            figures[f"gradient_of_{rows}"] = _timed(bench, partial(bench.gradient, x)) / rows
    return "pass", "milliseconds a picture, without and with its gradient, by batch", figures


def _timed(bench: Bench, call: Callable[[], Any]) -> float:
    """Return the median time of a few calls, in milliseconds, after one to warm up."""

    def once() -> float:
        start = time.perf_counter()
        call()
        if bench.device.type == "cuda":
            torch.cuda.synchronize(bench.device)
        return 1000 * (time.perf_counter() - start)

    repeats = 5 if once() < 200 else 1
    return median(once() for _ in range(repeats))


def memory(bench: Bench) -> Seen:
    """Measure the memory of the reward's own tensors, and of one picture's backward pass."""
    own = [*bench.reward.parameters(), *bench.reward.buffers()]
    figures = {"reward_mb": sum(t.numel() * t.element_size() for t in own) / 1e6}
    n = len(bench.images)
    cuda = bench.device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(bench.device)
        torch.cuda.reset_peak_memory_stats(bench.device)
        before = torch.cuda.memory_allocated(bench.device)
    if bench.ok("differentiable") and bench.reward.differentiable:
        figures["backward_mb"] = _kept(bench, own) / n / 1e6
        line = "the reward's own tensors, and what one picture's backward pass keeps, in MB"
    else:
        line = "the reward's own tensors, in MB"
    if cuda:
        if bench.ok("differentiable") and bench.reward.differentiable:
            bench.gradient(bench.images)
        else:
            bench.scores(bench.images)
        peak = torch.cuda.max_memory_allocated(bench.device) - before
        figures["peak_mb"] = peak / n / 1e6
        line += "; a picture's peak on the GPU"
    return "pass", line, figures


class _Kept:
    """A tensor that autograd keeps for the backward pass: it is freed with its graph."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _kept(bench: Bench, own: Sequence[Tensor]) -> int:
    """Return the bytes kept for the ordinary pictures' backward pass, without the reward's own."""
    x = bench.images.clone().requires_grad_()
    alive: WeakSet[_Kept] = WeakSet()

    def pack(tensor: Tensor) -> _Kept:
        kept = _Kept(tensor)
        alive.add(kept)
        return kept

    with differentiating():
        given = x.clone()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
            scores = ask(bench.reward, given, bench.rows(len(x)))
    storages = {k.tensor.untyped_storage().data_ptr(): k.tensor for k in alive}
    for known in [*own, given]:
        storages.pop(known.untyped_storage().data_ptr(), None)
    del scores
    return sum(t.untyped_storage().nbytes() for t in storages.values())
