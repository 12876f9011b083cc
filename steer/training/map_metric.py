"""Distances between a learned map and the true one, if that is known."""

from collections.abc import Callable

import torch
from torch import Generator, Tensor

from steer.flow import FlowMap, composed
from steer.path import step_times

__all__ = ["jacobian_error", "lookahead_error", "samples", "saved_bytes", "sliced_w2"]


def sliced_w2(x: Tensor, y: Tensor, generator: Generator, directions: int = 128) -> float:
    """Return the sliced 2-Wasserstein distance of two samples of one size, in the units of x.

    The root of the mean, over directions, of the squared W2 distance of the projections (Rabin et
    al. 2011).

    Args:
        x: (n, d).
        y: (n, d).
        generator: generator of the directions.
        directions: number of directions.
    """
    along = torch.randn(x.shape[1], directions, generator=generator, dtype=torch.float64)
    along = along / along.norm(dim=0)
    a, b = ((z.double() @ along).sort(0).values for z in (x, y))
    return float((a - b).square().mean().sqrt())


@torch.no_grad()
def samples(flow: FlowMap, noise: Tensor, steps: int) -> Tensor:
    """Return the samples after `steps` equal jumps from noise."""
    return composed(flow, noise, step_times(steps))


@torch.no_grad()
def lookahead_error(flow: FlowMap, true: FlowMap, noise: Tensor, t: float) -> tuple[float, float]:
    """Return the root mean square errors of map and denoiser as lookaheads from t.

    Both are compared with the end of the true flow, at points that the true flow carries from
    noise to t. The denoiser is the true one.

    Args:
        flow: the learned map.
        true: the true flow, with its exact jump.
        noise: (n, d), float64.
        t: in [0, 1).
    """
    x = true.jump(noise, 0.0, t) if t else noise
    end = true.jump(x, t, 1.0)
    ours = flow.jump(x.to(_dtype(flow)), t, 1.0).double()
    errors = [float((y - end).square().mean().sqrt()) for y in (ours, true.denoise(x, t))]
    return errors[0], errors[1]


@torch.no_grad()
def jacobian_error(
    flow: FlowMap, true: FlowMap, noise: Tensor, t: float, step: float = 1e-3
) -> float:
    """Return the relative error of `∇X(t,1,x)`, which guidance uses.

    It is the root mean square of the difference of the matrices, by central differences of both
    maps, over that of the true ones.

    Args:
        flow: the learned map.
        true: the true flow.
        noise: (n, d), float64.
        t: in [0, 1).
        step: half of the difference.
    """
    x = true.jump(noise, 0.0, t) if t else noise
    wrong, size = 0.0, 0.0
    for k in range(x.shape[1]):
        shift = torch.zeros_like(x)
        shift[:, k] = step
        ends = [f.jump((x + sign * shift).to(_dtype(f)), t, 1.0).double()
                for f in (flow, true) for sign in (1, -1)]  # fmt: skip
        ours, exact = ends[0] - ends[1], ends[2] - ends[3]
        wrong += float((ours - exact).square().sum())
        size += float(exact.square().sum())
    return (wrong / size) ** 0.5


def saved_bytes(step: Callable[[], object]) -> int:
    """Return the bytes of all tensors that one call saves for its backward pass.

    Args:
        step: a function without arguments.
    """
    total = 0

    def keep(x: Tensor) -> Tensor:
        nonlocal total
        total += x.numel() * x.element_size()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        step()
    return total


def _dtype(flow: FlowMap) -> torch.dtype:
    some = next(iter(flow.parameters()), None)
    return torch.float64 if some is None else some.dtype
