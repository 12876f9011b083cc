"""Scores with a gradient that was computed earlier: from a finished chunk, or by a server."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["with_gradient"]


def with_gradient(images: Tensor, scores: Tensor, gradient: Tensor) -> Tensor:
    """Return the scores with this gradient to the images; there is no second derivative.

    >>> x = torch.zeros(2, 3, 1, 1, requires_grad=True)
    >>> with_gradient(x, torch.ones(2), torch.ones_like(x)).sum().backward()
    >>> float(x.grad.sum())
    6.0

    Args:
        images: (n, 3, h, w), requiring a gradient.
        scores: (n,).
        gradient: (n, 3, h, w), row i being d scores_i / d images_i.
    """
    return _Known.apply(images, scores, gradient)


class _Known(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, scores: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        ctx.dtype = images.dtype
        return scores.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        rows = upstream.to(gradient).reshape(-1, *[1] * (gradient.ndim - 1))
        return (rows * gradient).to(ctx.dtype), None, None
