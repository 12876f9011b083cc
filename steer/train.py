"""Lightning training of a flow map: running average, exact resume, Muon with AdamW.

Everything that is drawn in step k is a function of (seed, k), so a run that was stopped and
resumed equals one that never was. Import it by name: `import steer` does not load Lightning.
"""

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from steer.flow import FlowMap

__all__ = ["Batches", "FlowTraining", "MuonAdamW", "generator_of", "step_loader", "warm_cosine"]

Objective = Callable[[FlowMap, FlowMap, Tensor, Sequence[str], torch.Generator], dict[str, Tensor]]
Batch = tuple[Tensor, list[str]]


def generator_of(seed: int, step: int, stream: int = 0) -> torch.Generator:
    """Return the generator of one step: a function of (seed, step, stream) alone."""
    mixed = (seed * 1_000_003 + step) * 7 + stream
    return torch.Generator().manual_seed(mixed % (1 << 63))


class Batches:
    """Draw the batch of a step: shifted pictures in [-1, 1] and their captions.

    A picture is shifted by up to `shift` whole pixels, but only inside its own blank margin: no
    ink is ever cut. Every picture is seen once before any is seen twice.

    Args:
        images: pictures on white (n, 3, h, w) in [0, 1]; their ink says how far one may shift.
        draw: (index, generator) -> (the picture or a variant of it, a caption).
        batch_size: pictures a step.
        seed: with the step, it fixes the batch.
        empty: share of empty prompts.
        shift: largest shift in pixels.
    """

    def __init__(
        self,
        images: Tensor,
        draw: Callable[[int, torch.Generator], tuple[Tensor, str]],
        batch_size: int,
        *,
        seed: int = 0,
        empty: float = 0.12,
        shift: int = 2,
    ) -> None:
        self.images, self.draw, self.batch_size = images, draw, batch_size
        self.seed, self.empty, self.shift = seed, empty, shift
        ink = (images < 0.99).any(1)
        rows, columns = ink.any(2).int(), ink.any(1).int()
        margins = [rows.argmax(1), rows.flip(1).argmax(1)]
        margins += [columns.argmax(1), columns.flip(1).argmax(1)]
        self.margins = torch.stack(margins, 1).clamp(max=shift)

    def _shifted(self, i: int, picture: Tensor, generator: torch.Generator) -> Tensor:
        shifts = []
        for before, after in self.margins[i].reshape(2, 2).tolist():
            shifts.append(int(torch.randint(-before, after + 1, (), generator=generator)))
        return picture.roll(shifts, (1, 2))

    def __call__(self, step: int) -> Batch:
        """Return the pictures (batch, 3, h, w) and the prompts of a step."""
        n = len(self.images)
        places = range(step * self.batch_size, (step + 1) * self.batch_size)
        orders = {
            epoch: torch.randperm(n, generator=generator_of(self.seed, epoch, 1)).tolist()
            for epoch in {p // n for p in places}
        }
        generator = generator_of(self.seed, step, 2)
        pictures, prompts = [], []
        for p in places:
            i = orders[p // n][p % n]
            picture, caption = self.draw(i, generator)
            pictures.append(self._shifted(i, picture, generator))
            none = float(torch.rand((), generator=generator)) < self.empty
            prompts.append("" if none else caption)
        return 2 * torch.stack(pictures) - 1, prompts


def step_loader(steps: int) -> DataLoader:
    """Return a loader that only counts: the batch itself is a function of the global step."""
    return DataLoader(range(steps), batch_size=None)  # type: ignore[arg-type]


def warm_cosine(optimizer: torch.optim.Optimizer, steps: int, warm: int = 50) -> dict[str, Any]:
    """Return Lightning's description of a schedule: `warm` steps up, then a cosine to zero."""

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
        parameters: what to train.
        muon: learning rate of the matrices.
        adamw: learning rate of the rest: vectors and word embeddings.
        embeddings: parameters that are looked up, not multiplied; they go to AdamW.
        weight_decay: of the matrices.
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
            update = _muon if group["matrix"] else _adamw
            for p in group["params"]:
                if p.grad is not None:
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.sub_(group["lr"] * update(p.grad, self.state[p]))
        return loss


def _muon(grad: Tensor, state: dict[str, Any], momentum: float = 0.95) -> Tensor:
    """Nesterov momentum with its singular values pushed to one."""
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
    """Adam's bias-corrected step (Kingma & Ba 2015, arXiv 1412.6980)."""
    if not state:
        state["count"] = torch.tensor(0)
        state["first"], state["second"] = torch.zeros_like(grad), torch.zeros_like(grad)
    state["count"] += 1
    k = int(state["count"])
    first = state["first"].lerp_(grad, 1 - betas[0]) / (1 - betas[0] ** k)
    second = state["second"].lerp_(grad.square(), 1 - betas[1]) / (1 - betas[1] ** k)
    return first / (second.sqrt() + 1e-8)


class FlowTraining(L.LightningModule):
    """Train a flow map with an objective, keeping the running average of its weights.

    Args:
        flow: what is trained, in place.
        objective: (flow, average, x_1, prompts, generator) -> {"loss", ...}.
        batches: step -> (x_1, prompts).
        steps: length of the run: the rates follow a cosine to zero over it.
        seed: with the step, it fixes noise and times.
        average: decay of the running average (shorter at the start).
        muon: learning rate of the matrices.
        adamw: learning rate of the rest.
    """

    def __init__(
        self,
        flow: FlowMap,
        objective: Objective,
        batches: Callable[[int], Batch],
        *,
        steps: int,
        seed: int = 0,
        average: float = 0.998,
        muon: float = 2e-3,
        adamw: float = 1e-3,
    ) -> None:
        super().__init__()
        self.flow = flow
        self.average = copy.deepcopy(flow).eval().requires_grad_(False)
        self.objective, self.batches = objective, batches
        self.steps, self.seed, self.decay = steps, seed, average
        self.rates = {"muon": muon, "adamw": adamw}

    def training_step(self, batch: Any, index: int) -> Tensor:
        """Return the loss of the batch that belongs to the global step."""
        x_1, prompts = self.batches(self.global_step)
        generator = generator_of(self.seed, self.global_step, 3)
        terms = self.objective(self.flow, self.average, x_1.to(self.device), prompts, generator)
        self.log_dict(terms, prog_bar=True, batch_size=len(x_1))
        return terms["loss"]

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Take a step, then move the running average towards the new weights.

        Here and not at the batch's end, where checkpoints are written before it would move.
        """
        k = self.global_step + 1
        super().optimizer_step(*args, **kwargs)
        decay = min(self.decay, (1 + k) / (10 + k))
        pairs = list(zip(self.average.parameters(), self.flow.parameters(), strict=True))
        with torch.no_grad():
            torch._foreach_lerp_([a for a, _ in pairs], [p for _, p in pairs], 1 - decay)

    def configure_optimizers(self) -> Any:
        """Muon and AdamW, 50 steps up, then a cosine to zero."""
        tables = [m.weight for m in self.flow.modules() if isinstance(m, nn.Embedding)]
        optimizer = MuonAdamW(self.flow.parameters(), **self.rates, embeddings=tables)

        return {"optimizer": optimizer, "lr_scheduler": warm_cosine(optimizer, self.steps)}
