"""Statistics of pictures: pixels, diversity, kernel distance, and drift of the velocity.

They compare tuned pictures with the base's pictures: see `steer.tuning.instruments`.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from steer.flow import FlowMap

__all__ = [
    "DRIFT_CALLS",
    "PIXELS",
    "Drift",
    "check_pictures",
    "diversity",
    "features_of",
    "image_statistics",
    "kid",
    "pooled_pixels",
    "velocity_distance",
]

BINS = 16
"""Bins of the histogram of luminance, of at most 4 bits entropy. More would detect faint grain."""

EDGE = 0.2
"""Luminance that changes by more than this over two pixels is an edge."""

OUTSIDE = 0.02
"""A channel value further than this outside [0, 1] counts as clipped; 5 of 255 levels."""

PIXELS = 2**22
"""Number of pixels that are measured at once."""

DRIFT_CALLS = 13
"""Network calls of `velocity_distance` for each row, of both flows, at its default times."""


def image_statistics(images: Tensor) -> dict[str, Tensor]:
    """Describe each picture by six numbers, name -> (n,) float32.

    With x clamped to [0, 1] (but for the last), `y = .2126 R + .7152 G + .0722 B` its luminance
    and p its pixels:

    - `brightness`: `mean_p y_p`.
    - `saturation`: `mean_p (max - min) / max` over the channels of each pixel, as in HSV; 0 where
      the pixel is black.
    - `entropy`: `-sum_b q_b log2 q_b` bits, q the histogram of y in 16 equal bins: 0 to 4.
    - `edge_density`: share of pixels with `|grad y| > .2`, grad being Sobel's over 4 (a step from
      black to white has 1 at the two pixels beside it), a neighbour beyond the border being the
      pixel itself.
    - `high_frequency`: `sum_{|f| > 1/4} |F_f|^2 / (sum_{f != 0} |F_f|^2 + e)`, F the discrete
      Fourier transform of each channel, f in cycles a pixel, so that 1/4 is half the Nyquist
      frequency; e is the energy of a variance of 1e-8, so that a plain picture has 0.
    - `clipped`: share of channel values outside [0, 1] by more than .02, before the clamp.

    Args:
        images: (n, 3, h, w), nominally in [0, 1], any size, device or floating type.

    Raises:
        ValueError: another shape, or values that are not finite.
    """
    check_pictures(images)
    rows = max(1, PIXELS // images[0, 0].numel())
    parts = [_statistics(part.detach().float()) for part in images.split(rows)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _statistics(images: Tensor) -> dict[str, Tensor]:
    """Measure float pictures, all at once."""
    outside = (images < -OUTSIDE) | (images > 1 + OUTSIDE)
    x = images.clamp(0, 1)
    y = (x * x.new_tensor([0.2126, 0.7152, 0.0722])[:, None, None]).sum(1)
    most, least = x.amax(1), x.amin(1)
    return {
        "brightness": y.mean((1, 2)),
        "saturation": ((most - least) / most.clamp(min=1e-6)).mean((1, 2)),
        "entropy": _entropy(y),
        "edge_density": (_gradient(y) > EDGE).float().mean((1, 2)),
        "high_frequency": _high_frequency(x),
        "clipped": outside.float().mean((1, 2, 3)),
    }


def _entropy(y: Tensor) -> Tensor:
    """Return the entropy of each row's histogram, in bits."""
    index = (y.flatten(1) * BINS).long().clamp(max=BINS - 1)
    rows = torch.arange(len(y), device=y.device)[:, None] * BINS
    counts = torch.bincount((index + rows).flatten(), minlength=len(y) * BINS)
    q = counts.view(len(y), BINS).float() / index.shape[1]
    return -torch.xlogy(q, q).sum(1) / math.log(2)


def _gradient(y: Tensor) -> Tensor:
    """Return Sobel's gradient over 4, its magnitude, (n, h, w)."""
    wide = F.pad(y[:, None], (1, 1, 1, 1), mode="replicate")[:, 0]
    rows = (wide[:, :-2] + 2 * wide[:, 1:-1] + wide[:, 2:]) / 4
    columns = (wide[..., :-2] + 2 * wide[..., 1:-1] + wide[..., 2:]) / 4
    across = rows[..., 2:] - rows[..., :-2]
    down = columns[:, 2:] - columns[:, :-2]
    return torch.hypot(across, down)


def _high_frequency(x: Tensor) -> Tensor:
    """Return the share of the spectrum's energy above half the Nyquist frequency."""
    h, w = x.shape[-2:]
    f_y, f_x = (torch.fft.fftfreq(k, device=x.device) for k in (h, w))
    radius = torch.hypot(f_y[:, None], f_x[None])
    energy = torch.fft.fft2(x - x.mean((2, 3), keepdim=True)).abs().square().mean(1)
    energy = energy / (h * w) ** 2  # in units of variance, to which they sum
    high, low = radius > 0.25, (radius <= 0.25) & (radius > 0)
    above, below = (energy * high).sum((1, 2)), (energy * low).sum((1, 2))
    return above / (above + below + 1e-8)


def check_pictures(images: Tensor) -> None:
    """Raise a ValueError unless the images are pictures (n, 3, h, w) of finite floats."""
    if images.ndim != 4 or images.shape[1] != 3 or not images.numel():
        raise ValueError(
            f"pictures must be (n, 3, h, w), at least one, got {tuple(images.shape)}: decode the "
            "samples (flow.decode), and join prompts and particles in one axis (flatten(0, 1))"
        )
    if not images.is_floating_point():
        raise ValueError(f"pictures must be floats in [0, 1], got {images.dtype}: divide by 255")
    bad = (~torch.isfinite(images)).flatten(1).any(1).nonzero()
    if len(bad):
        raise ValueError(
            f"{len(bad)} of {len(images)} pictures have values that are not finite, the first is "
            f"row {int(bad[0])}: the weights have diverged; go back to an earlier checkpoint and "
            "lower the learning rate"
        )


def pooled_pixels(images: Tensor) -> Tensor:
    """Return the pictures (n, 3, h, w) averaged over an 8 x 8 grid -> (n, 192) in [0, 1]."""
    return F.adaptive_avg_pool2d(images.detach().float().clamp(0, 1), 8).flatten(1)


def features_of(judge: object) -> Callable[[Tensor], Tensor]:
    """Return the function from pictures (n, 3, h, w) to features (n, d) for distances.

    It is the judge's method `features(images)` if it has one, as `rewards.judge.Judge` does; else
    `pooled_pixels`.
    """
    own = getattr(judge, "features", None)
    return own if callable(own) else pooled_pixels


def diversity(features: Tensor, prompts: int) -> Tensor:
    """Return the diversity of the samples of each prompt, (p,).

    `mean_{i<j} |f_i - f_j|` over the pairs of one prompt's n rows, with the Euclidean distance. 0
    means that all pictures are the same.

    Args:
        features: (p * n, d), prompt-major; of pictures, see `features_of` and `pooled_pixels`.
        prompts: p.

    Raises:
        ValueError: the rows do not split evenly, or there is one row for each prompt.
    """
    if features.ndim != 2:
        raise ValueError(
            f"features must be (p * n, d), got {tuple(features.shape)}: for pictures, call "
            "pooled_pixels(images) or features_of(judge)(images) first"
        )
    n, rest = divmod(len(features), prompts)
    if rest or n < 2:
        raise ValueError(
            f"{len(features)} rows for {prompts} prompts: give the same number for each, and at "
            "least 2 (particles=2), or there is no distance to measure"
        )
    rows = features.detach().float().unflatten(0, (prompts, n))
    distance = (rows[:, :, None] - rows[:, None]).norm(dim=-1)
    return distance.sum((1, 2)) / (n * (n - 1))


def kid(
    a: Tensor, b: Tensor, subset: int = 100, subsets: int = 50, *, paired: bool = False
) -> tuple[float, float]:
    """Return the kernel distance of two sets of features, and its spread over subsets.

    KID (Bińkowski et al. 2018, arXiv 1801.01401): the squared maximum mean discrepancy

        `mean_{i != j} k(a_i, a_j) + mean_{i != j} k(b_i, b_j) - 2 mean_{i, j} k(a_i, b_j)`

    under `k(x, y) = (x . y / d + 1)^3`. It is unbiased, so for two sets of one law it is 0 on
    average, and sometimes negative. Returned are mean and standard deviation over random subsets,
    which are chosen with a fixed seed. It depends on the features: compare only values of the same
    judge.

    If row i of both sets came from the same noise, they are not independent: set `paired`. The
    last mean is then also over i != j (the U-statistic of Gretton et al. 2012, JMLR 13), so that
    equal pictures give 0, and a subset has the same rows of both sets.

    Args:
        a: (n, d).
        b: (m, d).
        subset: rows of a subset, or all rows if there are fewer.
        subsets: number of subsets.
        paired: whether rows correspond.

    Raises:
        ValueError: fewer than 2 rows, features of different lengths, or `paired` with different
            numbers of rows.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1:] != b.shape[1:] or min(len(a), len(b)) < 2:
        raise ValueError(
            f"features must be (n, d) and (m, d), at least 2 rows each, got {tuple(a.shape)} and "
            f"{tuple(b.shape)}: take both from the same extractor"
        )
    if paired and len(a) != len(b):
        raise ValueError(
            f"{len(a)} and {len(b)} rows are not pairs: sample both from the same noise"
        )
    size = min(subset, len(a), len(b))
    generator = torch.Generator().manual_seed(0)
    values = []
    for _ in range(subsets):
        rows = torch.randperm(len(a), generator=generator)[:size]
        others = rows if paired else torch.randperm(len(b), generator=generator)[:size]
        values.append(_mmd(a[rows.to(a.device)], b[others.to(b.device)], paired))
    found = torch.stack(values)
    return float(found.mean()), float(found.std(unbiased=False))


def _mmd(a: Tensor, b: Tensor, paired: bool) -> Tensor:
    """Return the squared discrepancy of two sets of equal size, in float64."""
    a, b = a.detach().double(), b.detach().double().to(a.device)
    m, d = a.shape

    def others(x: Tensor, y: Tensor) -> Tensor:
        k = (x @ y.T / d + 1) ** 3
        return (k.sum() - k.diagonal().sum()) / (m * (m - 1))

    cross = others(a, b) if paired else ((a @ b.T / d + 1) ** 3).mean()
    return (others(a, a) + others(b, b) - 2 * cross).cpu()


class Drift(NamedTuple):
    """The relative distance of a flow from its base; 0 is the base itself.

    Attributes:
        velocity: of the velocities along the base's path.
        jump: of the displacement of one jump from noise to data.
    """

    velocity: float
    jump: float


@torch.no_grad()
def velocity_distance(
    flow: FlowMap,
    base: FlowMap,
    x_0: Tensor,
    times: Sequence[float] = (0.0, 0.25, 0.5, 0.75),
) -> Drift:
    """Return the drift of a flow from its base.

    With `x_t = X_base(0, t, x_0)`, the squares averaged over rows and components and, for the
    first, over the times:

        velocity: `sqrt(mean |b_t(x_t) - b^base_t(x_t)|^2 / mean |b^base_t(x_t)|^2)`
        jump:     `sqrt(mean |X(0,1,x_0) - X_base(0,1,x_0)|^2 / mean |X_base(0,1,x_0) - x_0|^2)`

    Args:
        flow: the tuned map, bound to prompts where it has any.
        base: what it was tuned from, bound to the same.
        x_0: noise, (n, *event), prompt-major.
        times: in [0, 1).

    Raises:
        ValueError: no noise or no times, times out of range, or a base with zero velocity.
    """
    if not len(x_0) or x_0.shape[1:] != torch.Size(base.event_shape):
        raise ValueError(
            f"noise must be (n, {', '.join(map(str, base.event_shape))}), at least one row, got "
            f"{tuple(x_0.shape)}"
        )
    if not times or not all(0 <= t < 1 for t in times):
        raise ValueError(f"times must be in [0, 1), at least one, got {tuple(times)}")
    apart = moved = 0.0
    for t in times:
        x_t = base.jump(x_0, 0.0, t) if t else x_0
        b = base.velocity(x_t, t).float()
        apart += float((flow.velocity(x_t, t).float() - b).square().mean())
        moved += float(b.square().mean())
    end = base.jump(x_0, 0.0, 1.0).float()
    jump = float((flow.jump(x_0, 0.0, 1.0).float() - end).square().mean())
    length = float((end - x_0.float()).square().mean())
    if not moved * length:
        raise ValueError(
            "the base does not move these points, so no relative change can be computed"
        )
    return Drift(math.sqrt(apart / moved), math.sqrt(jump / length))
