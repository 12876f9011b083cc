"""One-time models as flows: networks that predict noise, data, v or the velocity at one time."""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from steer.flow import FlowMap
from steer.path import Path, Time, as_time, like

__all__ = ["OneTime"]

Network = Callable[[Tensor, Tensor], Tensor]
Prediction = Literal["eps", "x0", "v", "velocity"]


class OneTime(FlowMap):
    """The flow of a network `f(x, t)` that knows one time alone.

    What the network predicts becomes the denoiser, with `x = alpha eps + beta x_1` and x_1 what
    others call x0:

        "eps":       `D = (x - alpha f) / beta`             (Ho et al. 2020, 2006.11239)
        "x0":        `D = f`
        "v":         `D = (beta x - alpha f) / (alpha² + beta²)`   (Salimans, Ho 2022, 2202.00512)
        "velocity":  `D` by theory (4)                       (Lipman et al. 2023, 2210.02747)

    A jump is made of steps that hold the denoiser, `x_t = (alpha_t / alpha_s) (x - beta_s D) +
    beta_t D`: DDIM's (Song et al. 2021, 2010.02502). A velocity model takes `steps` of them for a
    jump from 0 to 1, and fewer for a shorter one; the network calls are counted. A one-jump
    student (a consistency model, a turbo model) takes one, whatever the distance.

    Args:
        network: (x (n, *event), t (n,)) -> its prediction (n, *event), t as this library has it: 0
            noise, 1 data. Where yours has steps of its own, translate them here.
        path: the interpolation that it was trained on.
        event_shape: the shape of one x.
        predicts: what the network predicts.
        steps: of a jump from 0 to 1; None: a one-jump student.
        first: times below this are shown to the network as this one: "eps" says nothing of the
            data at t = 0.
        churn: how far its own sampler re-noises, see `steer.Jump`; 1 for consistency models.
        bind: prompts -> the network bound to them, for rows that are prompt-major; None: the model
            takes no prompts.
        module: what holds the weights, where `network` is a function: it is moved and adapted.

    Raises:
        ValueError: another prediction, or numbers out of range.
    """

    def __init__(
        self,
        network: Network,
        path: Path,
        event_shape: Sequence[int],
        predicts: Prediction = "velocity",
        steps: int | None = 16,
        *,
        first: float = 1e-3,
        churn: float = 0.0,
        bind: Callable[[Sequence[str]], Network] | None = None,
        module: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if predicts not in ("eps", "x0", "v", "velocity"):
            raise ValueError(
                f"predicts is 'eps', 'x0', 'v' or 'velocity', got {predicts!r}: what the network "
                "was trained to give"
            )
        if steps is not None and steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}; None for a one-jump student")
        if not 0 < first < 1:
            raise ValueError(f"first must be between 0 and 1, got {first}")
        self.network = network if isinstance(network, nn.Module) else module
        self._predict, self._bind = network, bind
        self.path, self.event_shape, self.predicts = path, tuple(event_shape), predicts
        self.steps, self.first, self.churn = steps, first, churn
        self.kind = "one-jump" if steps is None else "velocity"

    @property
    def denoiser(self) -> nn.Module:
        """The module that holds the network's weights; the flow itself, where it has none."""
        return self if self.network is None else self.network

    def given(self, prompts: Sequence[str]) -> "OneTime":
        """Bind prompts; itself, where the model takes none."""
        if self._bind is None:
            return self
        bound = copy.copy(self)
        bound._modules = dict(self._modules)
        bound._predict = self._bind(list(prompts))
        return bound

    def denoise(self, x: Tensor, t: Time) -> Tensor:
        """Return `D_t(x)` from one prediction, (n, *event); x itself at t = 1."""
        time = as_time(t)
        end = time == 1
        if bool(end.all()):
            return x
        seen = torch.where(end, 0.5, time).clamp(min=self.first)
        d = self._denoised(x, seen)
        return torch.where(like(end.to(x.dtype), x) == 1, x, d) if bool(end.any()) else d

    def _denoised(self, x: Tensor, t: Tensor) -> Tensor:
        f = self._predict(x, t.to(x.device, torch.float32).expand(len(x)))
        if self.predicts == "x0":
            return f
        if self.predicts == "velocity":
            return self.path.denoised(x, f, t)
        alpha, beta = (like(c, x) for c in self.path(t))
        if self.predicts == "eps":
            return (x - alpha * f) / beta
        return (beta * x - alpha * f) / (alpha**2 + beta**2)

    def velocity(self, x: Tensor, t: Time) -> Tensor:
        """Return `b_t(x) = alpha' (x - beta D) / alpha + beta' D`, (n, *event)."""
        if self.predicts == "velocity":
            return self._predict(x, as_time(t).to(x.device, torch.float32).expand(len(x)))
        t = as_time(t).clamp(max=1 - 1e-4)  # alpha is 0 at the end
        (alpha, beta), (alpha_dot, beta_dot) = self.path(t), self.path.derivative(t)
        d = self.denoise(x, t)
        return like(alpha_dot / alpha, x) * (x - like(beta, x) * d) + like(beta_dot, x) * d

    def jump(self, x: Tensor, s: Time, t: Time) -> Tensor:
        """Return `X(s,t,x)` by steps that hold the denoiser: exactly x where s = t."""
        count = self.calls("jump", s, t)
        s, t = as_time(s), as_time(t)
        for k in range(count):
            x = self._hold(x, s + (t - s) * (k / count), s + (t - s) * ((k + 1) / count))
        return x

    def calls(self, name: str, *times: Time) -> int:
        """Return 1, and for a jump its number of steps: 0 from a time to itself."""
        if name != "jump":
            return 1
        far = float((as_time(times[1]) - as_time(times[0])).abs().max())
        if self.steps is None:
            return int(far > 0)
        return math.ceil(far * self.steps - 1e-6)

    def _hold(self, x: Tensor, s: Tensor, t: Tensor) -> Tensor:
        (alpha_s, beta_s), (alpha_t, beta_t) = self.path(s), self.path(t)
        stay = s == t
        ratio = torch.where(stay, 1.0, alpha_t / torch.where(alpha_s == 0, 1.0, alpha_s))
        d = self.denoise(x, s)
        return like(ratio, x) * x + like(beta_t - ratio * beta_s, x) * d
