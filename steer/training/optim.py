"""Muon and AdamW in one optimizer, and the schedule of their rates.

torch's `Muon` accepts only matrices, while most weights here are convolutions, and it iterates in
bfloat16. torch's `AdamW` would be a second optimizer, but Lightning's automatic optimisation
supports only one. So AdamW is implemented here, with its state in the same optimizer.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["MuonAdamW", "muon_update", "warm_cosine"]


def warm_cosine(optimizer: torch.optim.Optimizer, steps: int, warm: int = 50) -> dict[str, Any]:
    """Return a schedule for Lightning: `warm` steps of linear warm-up times a cosine to zero.

    torch's `LinearLR` and `CosineAnnealingLR` in a `SequentialLR` would start the cosine after the
    warm-up, and so give different rates.
    """

    def rate(k: int) -> float:
        return min(1.0, (k + 1) / warm) * 0.5 * (1 + math.cos(math.pi * min(1, k / steps)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    return {"scheduler": schedule, "interval": "step"}


class MuonAdamW(torch.optim.Optimizer):
    """Muon on the matrices, AdamW on the rest.

    Muon (Jordan et al. 2024) steps along the momentum with its singular values set to one, by
    five Newton-Schulz iterations; a convolution's weight counts as the matrix (out, in h w). The
    step is scaled by `0.2 sqrt(max(rows, columns))`, the root mean square of AdamW's (Liu et al.
    2025, arXiv 2502.16982).

    Args:
        parameters: parameters to train.
        muon: learning rate of the matrices.
        adamw: learning rate of the rest: vectors and word embeddings.
        embeddings: parameters that are looked up, not multiplied; they go to AdamW.
        weight_decay: weight decay of the matrices.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        muon: float = 2e-3,
        adamw: float = 1e-3,
        *,
        embeddings: Iterable[Tensor] = (),
        weight_decay: float = 0.01,
    ) -> None:
        looked_up = {id(p) for p in embeddings}
        matrices: list[nn.Parameter] = []
        rest: list[nn.Parameter] = []
        for p in parameters:
            (matrices if p.ndim >= 2 and id(p) not in looked_up else rest).append(p)
        groups = [
            {"params": matrices, "lr": muon, "matrix": True, "weight_decay": weight_decay},
            {"params": rest, "lr": adamw, "matrix": False, "weight_decay": 0.0},
        ]
        super().__init__([g for g in groups if g["params"]], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; the closure, if any, is run with gradients and its loss returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            update = muon_update if group["matrix"] else _adamw
            for p in group["params"]:
                if p.grad is not None:
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.sub_(group["lr"] * update(p.grad, self.state[p]))
        return loss


def muon_update(grad: Tensor, state: dict[str, Any], momentum: float = 0.95) -> Tensor:
    """Return Nesterov momentum with singular values close to one, in the gradient's shape."""
    if not state:
        state["momentum"] = torch.zeros_like(grad)
    m = state["momentum"].lerp_(grad, 1 - momentum)
    g = grad.lerp(m, momentum).flatten(1)
    x = g.mT if g.shape[0] > g.shape[1] else g
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    x = x.mT if g.shape[0] > g.shape[1] else x
    return (0.2 * max(g.shape) ** 0.5) * x.reshape(grad.shape)


def _adamw(grad: Tensor, state: dict[str, Any], betas: Sequence[float] = (0.9, 0.99)) -> Tensor:
    """Make Adam's bias-corrected step (Kingma & Ba 2015, arXiv 1412.6980)."""
    if not state:
        state["count"] = torch.tensor(0)
        state["first"], state["second"] = torch.zeros_like(grad), torch.zeros_like(grad)
    state["count"] += 1
    k = int(state["count"])
    first = state["first"].lerp_(grad, 1 - betas[0]) / (1 - betas[0] ** k)
    second = state["second"].lerp_(grad.square(), 1 - betas[1]) / (1 - betas[1] ** k)
    return first / (second.sqrt() + 1e-8)
