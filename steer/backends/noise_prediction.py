"""Stable Diffusion 1.5 and XL: noise prediction on a discrete variance-preserving path.

With `y = a x_1 + s eps`, `a² + s² = 1`, the state `x = y / (a + s)` lies on the linear path at
`t = a / (a + s)`, its velocity is `x_1 - eps`, and DDIM (Song et al. 2021, 2010.02502) is its
Euler step. The schedule of these models ends before pure noise, at t = .064. Below that time their
own samplers give the denoiser pure noise for y, and so does this package: `y = x / c_t`,
`c_t² = t² + (1-t)²`.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from steer.backends.pipeline import Kind, PipelineFlow, rows_time
from steer.path import Time, as_time, like

__all__ = ["StableDiffusion"]

STUDENTS = ("LCMScheduler", "TCDScheduler")
"""Schedulers that are only used for students."""

FIRST_STEPS = 10
"""Training steps in which a consistency model's data are not its denoiser's alone, to 3e-5."""

HINTS = ("turbo", "lcm", "hyper", "lightning", "tcd", "dmd", "distill")
"""Parts of the names of students."""


Number = float | Tensor


class Parts(NamedTuple):
    """Coefficients of data and noise as linear combinations of the denoiser's input and output."""

    data_y: Tensor
    data_out: Tensor
    noise_y: Tensor
    noise_out: Tensor


class StableDiffusion(PipelineFlow):
    """Stable Diffusion 1.5, XL, Turbo, LCM, Hyper-SD, TCD: whatever its scheduler steps by.

    Its grid is the scheduler's; of multi-step and stochastic schedulers (PNDM, DPM++, ancestral)
    only the times are used. The end is t = 1, also where the scheduler stops at its first training
    step (`set_alpha_to_one=False`).
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
        """Return "one-jump" for a student, known by its scheduler, its name, or as SDXL-Turbo.

        Turbo has an ancestral scheduler with trailing times.
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
        """The denoiser's prediction type: epsilon, v_prediction or sample."""
        return str(self.source.pipe.scheduler.config.prediction_type)

    # ------------------------------------------------------------ times

    def grid(self) -> list[float]:
        """Return the scheduler's times, from its noise levels if it has them, and then 1."""
        scheduler = self.source.pipe.scheduler
        if hasattr(scheduler, "sigmas") and len(scheduler.sigmas) == len(scheduler.timesteps) + 1:
            return [float(t) for t in 1 / (1 + scheduler.sigmas.double())]
        steps = scheduler.timesteps.long().cpu().unique().flip(0)
        return [float(t) for t in self._times_of_steps[steps]] + [1.0]

    def hear(self, grid: Sequence[float]) -> None:
        """Give the denoiser pure noise as the state of the grid's first step.

        A scheduler that spaces its steps from the data ("leading") starts at that step, not at the
        last training step.
        """
        self.first_step = float(self._steps_of(torch.tensor(grid[0], dtype=torch.float64)))

    def _steps_of(self, t: Tensor) -> Tensor:
        """Return the fractional training step of times."""
        table = self._times_of_steps.flip(0).to(t.device)
        i = torch.searchsorted(table, t.detach().contiguous()).clamp(1, len(table) - 1)
        part = ((t - table[i - 1]) / (table[i] - table[i - 1])).clamp(0, 1)
        return len(table) - i - part

    # ------------------------------------------------------------ the map

    def _seen(self, x: Tensor, scale: Number, step: Number) -> Tensor:
        """Return the denoiser's output for states scaled to unit variance, at a training step."""
        seen = rows_time(step, x)
        return self.by_rows(x * _for_rows(scale, x), seen, seen)

    def _at(self, s: Tensor) -> tuple[Tensor, Tensor, Parts]:
        """Return the scale and training step of time s, and the coefficients of data and noise."""
        step = self._steps_of(s).clamp(max=self.first_step)
        level = self._interpolated(step)
        size = _norm(level)
        return 1 / _norm(s), step, self._parts(level / size, (1 - level) / size)

    def _parts(self, a: Tensor, s: Tensor) -> Parts:
        """Return data and noise as linear combinations, `x_1 = d_y y + d_o out`, noise likewise.

        Args:
            a: coefficient of the data in y.
            s: coefficient of the noise in y.
        """
        zero, one = torch.zeros_like(a), torch.ones_like(a)
        if self.prediction == "epsilon":
            return Parts(1 / a, -s / a, zero, one)
        if self.prediction == "v_prediction":
            return Parts(a, -s, s, a)
        return Parts(zero, one, 1 / s, -a / s)

    def _interpolated(self, step: Tensor) -> Tensor:
        """Return the time of training steps, the inverse of `_steps_of`."""
        table = self._times_of_steps.to(step.device)
        low = step.floor().long().clamp(0, len(table) - 2)
        return table[low] + (step - low) * (table[low + 1] - table[low])

    @cached_property
    def _known(self) -> dict[tuple[Any, ...], list[float]]:
        return {}

    @property
    def start(self) -> float:
        """The time below which the denoiser is given pure noise."""
        return float(self._interpolated(torch.tensor(self.first_step, dtype=torch.float64)))

    def velocity(self, x: Tensor, t: Time) -> Tensor:
        """Return `(D - x) / (1 - t)`, with D the denoiser's estimate of the data."""
        scale, step, of_x, of_out = self._once(self._velocity, t)
        out = self._seen(x, scale, step)
        return _for_rows(of_x, x) * x + _for_rows(of_out, x) * out

    def jump(self, x: Tensor, s: Time, t: Time) -> Tensor:
        """Return `(1-t) eps + t D`: DDIM's step; exactly x where s = t.

        If both times are below the schedule's end, the state is only scaled.
        """
        scale, step, of_x, of_out = self._once(self._jump, s, t)
        out = self._seen(x, scale, step)
        return _for_rows(of_x, x) * x + _for_rows(of_out, x) * out

    def reuses(self, s: Time, t: Time) -> bool:
        """Return whether the jump begins where the denoiser is given the state, and no noise.

        At a consistency model's first training steps it does not: data and denoiser differ there.
        """
        step = float(self._steps_of(torch.tensor(float(s), dtype=torch.float64)))
        apart = self.churn > 0 and step < FIRST_STEPS
        return super().reuses(s, t) and float(s) >= self.start and not apart

    def _once(self, formula: Callable[..., tuple[Tensor, ...]], *times: Time) -> Sequence[Number]:
        """Return a formula's values at these times; a single time gives cached numbers."""
        given = [as_time(t) for t in times]
        if any(t.ndim or t.requires_grad or t.device.type != "cpu" for t in given):
            return formula(*(t.double() for t in given))
        key = formula.__name__, self.first_step, *map(float, given)
        if key not in self._known:
            self._known[key] = [float(v) for v in formula(*(t.double() for t in given))]
        return self._known[key]

    def _velocity(self, t: Tensor) -> tuple[Tensor, ...]:
        t = t.clamp(max=1 - 1e-4)
        scale, step, parts = self._at(t)
        return scale, step, (parts.data_y * scale - 1) / (1 - t), parts.data_out / (1 - t)

    def _jump(self, s: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        scale, step, parts = self._at(s)
        data_y, data_out = self._boundary(parts, s)
        of_x = ((1 - t) * parts.noise_y + t * data_y) * scale
        of_out = (1 - t) * parts.noise_out + t * data_out
        early, still = t <= self.start, s == t
        of_x = torch.where(early, _norm(t) * scale, of_x)
        of_x = torch.where(still, torch.ones_like(of_x), of_x)
        return scale, step, of_x, torch.where(early | still, torch.zeros_like(of_out), of_out)

    def _boundary(self, parts: Parts, s: Tensor) -> tuple[Tensor, Tensor]:
        """Return a latent consistency model's data: its condition at the first training step."""
        if self.churn == 0:
            return parts.data_y, parts.data_out
        n = 10.0 * self._steps_of(s)  # the scheduler's timestep_scaling
        skip, out = 0.25 / (n**2 + 0.25), n / (n**2 + 0.25).sqrt()
        return out * parts.data_y + skip, out * parts.data_out


def _for_rows(value: Number, x: Tensor) -> Number:
    return value if isinstance(value, float) else like(value, x)


def _norm(t: Tensor) -> Tensor:
    return (t**2 + (1 - t) ** 2).sqrt()
