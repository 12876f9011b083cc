"""Stable Diffusion 1.5 and XL: noise prediction on a discrete variance-preserving path.

With `y = a x_1 + s eps`, `a² + s² = 1`, the state `x = y / (a + s)` lies on the linear path at
`t = a / (a + s)`, its velocity is `x_1 - eps`, and DDIM (Song et al. 2021, 2010.02502) is its
Euler step. The schedule of these models ends before pure noise, at t = .064: below that their own
samplers give the denoiser pure noise for y, and so do we: `y = x / c_t`, `c_t² = t² + (1-t)²`.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from steer.backends.pipeline import Kind, PipelineFlow, rows_time
from steer.path import Time, as_time, like

__all__ = ["StableDiffusion"]

STUDENTS = ("LCMScheduler", "TCDScheduler")
"""Schedulers that only students are sampled by."""

HINTS = ("turbo", "lcm", "hyper", "lightning", "tcd", "dmd", "distill")
"""What the names of students have in them."""


class StableDiffusion(PipelineFlow):
    """Stable Diffusion 1.5, XL, Turbo, LCM, Hyper-SD, TCD: whatever its scheduler steps by.

    Its grid is the scheduler's; multi-step and stochastic schedulers (PNDM, DPM++, ancestral) are
    followed in their times alone. The end is t = 1, also where the scheduler stops at its first
    training step (`set_alpha_to_one=False`).
    """

    network_name, state_argument = "unet", "sample"
    adapter_targets = ("to_q", "to_k", "to_v", "to_out.0")

    def __init__(self, pipe: Any, **options: Any) -> None:
        levels = pipe.scheduler.alphas_cumprod.double().cpu()
        a, s = levels.sqrt(), (1 - levels).sqrt()
        self._times_of_steps = a / (a + s)  # decreasing in the training step
        self.first_step = float(len(levels) - 1)
        config = getattr(pipe, self.network_name).config
        if config.get("time_cond_proj_dim") is not None:  # a full LCM: guidance is embedded
            self.cfg_argument = None  # type: ignore[misc]
            self.guidance_argument = "guidance_scale"  # type: ignore[misc]
        super().__init__(pipe, **options)

    def found_kind(self) -> Kind:
        """Return "one-jump" for a student: by its scheduler, its name, or as SDXL-Turbo says it.

        Turbo's scheduler is an ancestral one with trailing times.
        """
        scheduler = self.source.pipe.scheduler
        spacing, kind = scheduler.config.get("timestep_spacing"), type(scheduler).__name__
        student = kind in STUDENTS or self.guidance_argument is not None
        turbo = kind == "EulerAncestralDiscreteScheduler" and spacing == "trailing"
        named = any(hint in self.source.name.lower() for hint in HINTS)
        return "one-jump" if student or turbo or named else "velocity"

    def found_churn(self) -> float:
        """Return 1 for latent consistency models, which jump to data and re-noise."""
        return float(type(self.source.pipe.scheduler).__name__ == "LCMScheduler")

    @cached_property
    def prediction(self) -> str:
        """What the denoiser predicts: epsilon, v_prediction or sample."""
        return str(self.source.pipe.scheduler.config.prediction_type)

    # ------------------------------------------------------------ times

    def grid(self) -> list[float]:
        """Return the scheduler's times: by its noise levels where it has them, then 1."""
        scheduler = self.source.pipe.scheduler
        if hasattr(scheduler, "sigmas") and len(scheduler.sigmas) == len(scheduler.timesteps) + 1:
            return [float(t) for t in 1 / (1 + scheduler.sigmas.double())]
        steps = scheduler.timesteps.long().cpu().unique().flip(0)
        return [float(t) for t in self._times_of_steps[steps]] + [1.0]

    def along(self, times: Sequence[float]) -> Self:
        """Return this flow as the pipeline samples on this grid.

        A scheduler that spaces its steps from the data ("leading") gives the denoiser pure noise
        as the state of its first step, not of the last training step.
        """
        for grid in self.source.grids():
            if len(grid) == len(times) and list(times)[1:] == grid[1:]:
                view = self._view()
                view.first_step = float(self._steps_of(as_time(grid[0])))
                return view
        return self

    def _steps_of(self, t: Tensor) -> Tensor:
        """Return the training step, not a whole one, of times."""
        table = self._times_of_steps.flip(0).to(t.device)
        i = torch.searchsorted(table, t.detach().contiguous()).clamp(1, len(table) - 1)
        part = ((t - table[i - 1]) / (table[i] - table[i - 1])).clamp(0, 1)
        return len(table) - i - part

    # ------------------------------------------------------------ the map

    def _parts(self, x: Tensor, s: Time) -> tuple[Tensor, Tensor]:
        """Return what the denoiser says of the data x_1 and of the noise, of states at time s."""
        s = as_time(s).double()
        step = self._steps_of(s).clamp(max=self.first_step)
        level = self._interpolated(step)
        scale = (level**2 + (1 - level) ** 2).rsqrt()
        a, sigma = like(level * scale, x), like((1 - level) * scale, x)
        y = x * like((s**2 + (1 - s) ** 2).rsqrt(), x)
        seen = rows_time(step, x)
        out = self.by_rows(y, seen, seen)
        if self.prediction == "epsilon":
            return (y - sigma * out) / a, out
        if self.prediction == "v_prediction":
            return a * y - sigma * out, sigma * y + a * out
        return out, (y - a * out) / sigma

    def _interpolated(self, step: Tensor) -> Tensor:
        """Return the time of training steps, the inverse of `_steps_of`."""
        table = self._times_of_steps.to(step.device)
        low = step.floor().long().clamp(0, len(table) - 2)
        return table[low] + (step - low) * (table[low + 1] - table[low])

    @property
    def start(self) -> float:
        """The time below which the denoiser is given pure noise."""
        return float(self._interpolated(torch.tensor(self.first_step, dtype=torch.float64)))

    def velocity(self, x: Tensor, t: Time) -> Tensor:
        """Return `(D - x) / (1 - t)`, with D what the denoiser says of the data."""
        time = as_time(t).clamp(max=1 - 1e-4)
        data, _ = self._parts(x, time)
        return (data - x) / like(1 - time, x)

    def jump(self, x: Tensor, s: Time, t: Time) -> Tensor:
        """Return `(1-t) eps + t D`: DDIM's step; exactly x where s = t.

        From below the schedule's end to below it, the state is scaled alone.
        """
        here, there = as_time(s).double(), as_time(t).double()
        data, noise = self._parts(x, s)
        moved = like(1 - there, x) * noise + like(there, x) * self._boundary(x, data, here)
        scaled = x * like((_norm(there) / _norm(here)), x)
        early = like((there <= self.start).to(x.dtype), x) == 1
        still = like((here == there).to(x.dtype), x) == 1
        return torch.where(still, x, torch.where(early, scaled, moved))

    def _boundary(self, x: Tensor, data: Tensor, s: Tensor) -> Tensor:
        """Return a latent consistency model's data: its condition at the first training step."""
        if self.churn == 0:
            return data
        n = 10.0 * self._steps_of(s)  # the scheduler's timestep_scaling
        skip, out = 0.25 / (n**2 + 0.25), n / (n**2 + 0.25).sqrt()
        y = x * like(_norm(s).reciprocal(), x)
        return like(out, x) * data + like(skip, x) * y


def _norm(t: Tensor) -> Tensor:
    return (t**2 + (1 - t) ** 2).sqrt()
