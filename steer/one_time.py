"""One-time models as flows: networks that predict noise, data, v or the velocity at one time."""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from steer.flow import FlowMap, per_row
from steer.onto import row_times
from steer.path import Path, Time, as_time, like

__all__ = ["OneTime"]

Network = Callable[..., Tensor]
Prediction = Literal["eps", "x0", "v", "velocity"]


class OneTime(FlowMap):
    """The flow of a network `f(x, t)` with one time input.

    What the network predicts becomes the denoiser, with `x = alpha eps + beta x_1`, where x_1 is
    often called x0 elsewhere:

        "eps":       `D = (x - alpha f) / beta`             (Ho et al. 2020, 2006.11239)
        "x0":        `D = f`
        "v":         `D = (beta x - alpha f) / (alpha² + beta²)`   (Salimans, Ho 2022, 2202.00512)
        "velocity":  `D` by theory (4)                       (Lipman et al. 2023, 2210.02747)

    A jump is made of steps that hold the denoiser, `x_t = (alpha_t / alpha_s) (x - beta_s D) +
    beta_t D`: DDIM's (Song et al. 2021, 2010.02502). A velocity model takes `steps` of them for a
    jump from 0 to 1, and fewer for a shorter jump; the network calls are counted. A one-jump
    student (a consistency model, a turbo model) takes one step for any jump.

    Args:
        network: `network(x, t)`, or `network(x, t, condition)` with `encode_prompts`, -> its
            prediction (n, *event), for x (n, *event) and t (n,) with this library's times: 0 is
            noise, 1 is data. If your network uses its own steps or times, convert them in this
            function. Make it a module, so that it is moved, copied and adapted with the flow.
        path: the interpolation that it was trained on.
        event_shape: the shape of one x.
        predicts: what the network predicts.
        steps: steps of a jump from 0 to 1; None: a one-jump student.
        first: for "eps" only: smaller times are passed to the network as this one, because at t =
            0 the noise contains no information about the data.
        churn: how far its own sampler re-noises, see `steer.Jump`; 1 for consistency models.
        encode_prompts: p prompts -> their condition, a tensor (p, ...), called once when prompts
            are bound; its rows are repeated for the particles. None: no prompts.

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
        encode_prompts: Callable[[Sequence[str]], Tensor] | None = None,
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
        self.network: nn.Module | None = network if isinstance(network, nn.Module) else None
        self._function = None if self.network is not None else network  # registered only once
        self._encode, self._condition = encode_prompts, cast(Tensor | None, None)
        self.path, self.event_shape, self.predicts = path, tuple(event_shape), predicts
        self.steps, self.first, self.churn = steps, first, churn
        self.kind = "one-jump" if steps is None else "velocity"

    @property
    def denoiser(self) -> nn.Module:
        """The module that contains the network's weights; the flow itself, if there is none."""
        return self if self.network is None else self.network

    def given(self, prompts: Sequence[str]) -> "OneTime":
        """Bind prompts, encoding them once; returns itself if the model takes none."""
        if self._encode is None:
            return self
        bound = copy.copy(self)
        bound._modules = dict(self._modules)
        bound._condition = self._encode(list(prompts))
        return bound

    def derives(self, name: str) -> bool:
        """Return whether it has no closed form: one prediction is velocity, denoiser and score."""
        return True if name == "denoise" else super().derives(name)

    def _predict(self, x: Tensor, t: Tensor) -> Tensor:
        t = row_times(t, x)
        network: Any = self._function if self.network is None else self.network
        if self._encode is None:
            return network(x, t)
        condition = self._encode([""]) if self._condition is None else self._condition
        return network(x, t, per_row(condition, len(x), "prompts"))

    def denoise(self, x: Tensor, t: Time) -> Tensor:
        """Return `D_t(x)` from one prediction, (n, *event); x itself at t = 1."""
        time = as_time(t)
        end = time == 1
        if bool(end.all()):
            return x
        seen = torch.where(end, 0.5, time)
        d = self._denoised(x, seen.clamp(min=self.first) if self.predicts == "eps" else seen)
        return torch.where(like(end.to(x.dtype), x) == 1, x, d) if bool(end.any()) else d

    def _denoised(self, x: Tensor, t: Tensor) -> Tensor:
        f = self._predict(x, t)
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
            return self._predict(x, as_time(t))
        t = as_time(t).clamp(max=1 - 1e-4)  # alpha is 0 at the end
        return self.path.velocity_of(x, self.denoise(x, t), t)

    def jump(self, x: Tensor, s: Time, t: Time) -> Tensor:
        """Return `X(s,t,x)` by steps with a constant denoiser: exactly x for s = t."""
        count = self.calls("jump", s, t)
        s, t = as_time(s), as_time(t)
        for k in range(count):
            now, then = s + (t - s) * (k / count), s + (t - s) * ((k + 1) / count)
            x = self.path.carried(x, self.denoise(x, now), now, then)
        return x

    def calls(self, name: str, *times: Time) -> int:
        """Return 1, and for a jump its number of steps: 0 from a time to itself."""
        if name not in ("jump", "mean_velocity"):
            return 1
        far = float((as_time(times[1]) - as_time(times[0])).abs().max())
        if self.steps is None:
            return int(far > 0)
        return math.ceil(far * self.steps - 1e-6)

    def reuses(self, s: Time, t: Time) -> bool:
        """Return whether the jump is one step."""
        return self.calls("jump", s, t) <= 1
