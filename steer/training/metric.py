"""Consistency errors of a flow map, and distances of its pictures to the training set."""

from collections.abc import Callable

import torch
from torch import Tensor

from steer.flow import FlowMap

__all__ = [
    "composition_error",
    "edge_energy",
    "grain",
    "lagrangian_residual",
    "laplacian",
    "nearest_distance",
    "retrieval_rate",
]


def _rms(x: Tensor) -> Tensor:
    return x.float().square().mean().sqrt()


@torch.no_grad()
def composition_error(flow: FlowMap, x: Tensor, s: float, u: float, t: float) -> float:
    """Return the relative error of `X(u,t) ∘ X(s,u) = X(s,t)`, theory (7).

    The root mean square of the difference over that of the displacement `X(s,t,x) - x`.

    Args:
        flow: the map.
        x: points at s, (n, *event).
        s: start.
        u: in between.
        t: end, s < u < t.
    """
    straight = flow.jump(x, s, t)
    composed = flow.jump(flow.jump(x, s, u), u, t)
    return float(_rms(composed - straight) / _rms(straight - x))


@torch.no_grad()
def lagrangian_residual(flow: FlowMap, x: Tensor, s: float, t: float, step: float = 1e-2) -> float:
    """Return the relative residual of `∂_t X(s,t,x) = b_t(X(s,t,x))`, theory (6).

    The time derivative is a central difference (one-sided at the ends of [s, 1]); the root mean
    square of the difference is relative to that of the velocity.

    Args:
        flow: the map.
        x: points at s, (n, *event).
        s: start.
        t: end, t > s.
        step: half-width of the difference.
    """
    low, high = max(s, t - step), min(1.0, t + step)
    rate = (flow.jump(x, s, high) - flow.jump(x, s, low)) / (high - low)
    b = flow.velocity(flow.jump(x, s, t), t)
    return float(_rms(rate - b) / _rms(b))


def nearest_distance(x: Tensor, reference: Tensor, exclude_self: bool = False) -> Tensor:
    """Return each row's root mean square distance to the nearest reference row, (n,).

    Args:
        x: (n, *event).
        reference: (m, *event).
        exclude_self: where `x` is `reference`, do not count a row's distance to itself.
    """
    size = x[0].numel() ** 0.5
    distance = torch.cdist(x.flatten(1).float(), reference.flatten(1).float()) / size
    if exclude_self:
        distance.fill_diagonal_(torch.inf)
    return distance.amin(1)


def retrieval_rate(
    similarity: Callable[[Tensor, list[str]], Tensor], images: Tensor, captions: list[str]
) -> tuple[float, float]:
    """Return the fraction of pictures whose own caption scores highest, and its standard error.

    Args:
        similarity: (images (n, ...), captions) -> scores (n, p).
        images: picture i was generated for caption i.
        captions: captions, all different.
    """
    scores = similarity(images, captions)
    hit = (scores.argmax(1) == torch.arange(len(captions), device=scores.device)).float()
    rate = float(hit.mean())
    return rate, (rate * (1 - rate) / len(captions)) ** 0.5


def laplacian(images: Tensor) -> Tensor:
    """Return `4 x - (its four neighbours)` of every channel, (n, c, h - 2, w - 2)."""
    inner = images[..., 1:-1, 1:-1]
    across = images[..., 1:-1, :-2] + images[..., 1:-1, 2:]
    return 4 * inner - across - images[..., :-2, 1:-1] - images[..., 2:, 1:-1]


def grain(images: Tensor) -> float:
    """Return the mean over pictures of the 30th percentile of |Laplacian|, in 1/255.

    It sees grain in flat places: real emoji have .7.

    Args:
        images: (n, c, h, w) in [0, 1].
    """
    size = laplacian(images.clamp(0, 1).float()).abs().flatten(1)
    return 255 * float(size.quantile(0.3, dim=1).mean())


def edge_energy(images: Tensor, reference: Tensor) -> float:
    """Return the mean squared Laplacian over that of a reference: below 1 is blurred.

    Args:
        images: (n, c, h, w) in [0, 1].
        reference: (m, c, h, w) in [0, 1].
    """
    mine, real = (laplacian(x.clamp(0, 1).float()).square().mean() for x in (images, reference))
    return float(mine / real)
