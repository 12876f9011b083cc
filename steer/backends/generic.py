"""A pipeline of an unknown class as a flow, derived from observed calls.

Two short runs of the pipeline show what changes from step to step (state and time), how the
denoiser's times follow the scheduler's noise levels, how a step follows from a prediction and how
guidance is mixed. The flow that fits is then run itself, and accepted only if its states and
pictures equal the pipeline's.
"""

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from steer.backends.checks import default_of, takes
from steer.backends.deducing import (
    Levels,
    at_norm,
    bound_of,
    error_of,
    implied,
    levels_of,
    mixing_of,
    sign_of,
    signal_of,
)
from steer.backends.folders import needs_diffusers
from steer.backends.latents import Layout
from steer.backends.noise_prediction import StableDiffusion
from steer.backends.pipeline import PipelineFlow
from steer.backends.watching import PROMPT, Found, Watched, names_of, steps_of, watch

__all__ = ["generic"]

LAYOUTS: dict[int, tuple[Layout, ...]] = {
    3: ("tokens",),
    4: ("grid", "patches"),
    5: ("grid", "frames"),
}
"""Number of axes of a state, including the batch axis -> its possible layouts."""

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


class Generic(PipelineFlow):
    """The flow of a pipeline that predicts velocities."""

    levels: ClassVar[Levels]
    rescaled: ClassVar[bool] = False

    def network_time(self, t: Tensor) -> Tensor:
        """Return the denoiser's times."""
        return self.levels(1 - t)

    def evaluate(self, x: Tensor, arguments: dict[str, Any]) -> Tensor:
        """Call the denoiser; a variance that it also predicts is dropped."""
        return super().evaluate(x, arguments)[:, : x.shape[1]]

    def mix(self, c: Tensor, u: Tensor) -> Tensor:
        """Return the guided prediction, rescaled to the norm of c if the pipeline does so."""
        mixed = super().mix(c, u)
        return at_norm(mixed, c) if self.rescaled else mixed

    def sized(self, height: int, width: int) -> Self:
        """Return the flow at another resolution, analysed again because times may depend on it."""
        return self._anew(height=height, width=width)

    def guided(self, scale: float, negative: str | None = None) -> Self:
        """Return the flow with guidance, analysed again."""
        return self._anew(cfg=scale, negative_prompt=negative)

    def _anew(self, **changed: Any) -> Any:
        options = {
            "height": self.height, "width": self.width, "cfg": self.cfg or self.no_cfg,
            "guidance": self.guidance, "negative_prompt": self.negative_prompt,
            "kind": self.kind, "frame": self.frame, "checkpointing": self.checkpointing,
            "call": self.call_arguments,
        }  # fmt: skip
        made = generic(self.source.pipe, **{**options, **changed})
        made.network, made.vae = self.network, self.vae  # which may have adapters
        made.glimpse = self.glimpse
        return made


class GenericNoise(Generic, StableDiffusion):
    """The flow of a pipeline that predicts noise, by a variance-preserving schedule."""

    def network_time(self, t: Tensor) -> Tensor:
        """Return t itself: a training step."""
        return t


def generic(pipe: Any, **options: Any) -> PipelineFlow:
    """Return the flow of a pipeline, deduced from two short runs of it.

    Args:
        pipe: the pipeline.
        **options: see `PipelineFlow`.

    Raises:
        ValueError: the pipeline cannot be recognised; the message says why.
    """
    try:
        return _found(pipe, dict(options))
    except _Unfit as error:
        raise ValueError(
            f"{type(pipe).__name__} is not a known class of pipelines, and its own call cannot be "
            f"used as a flow: {error}. See docs/models.md for those that are known, and for a "
            "model of your own docs/extend.md"
        ) from error


class _Unfit(ValueError):
    """The reason why a pipeline cannot be recognised."""


def _found(pipe: Any, options: dict[str, Any]) -> PipelineFlow:
    name, network = _denoiser(pipe)
    if not hasattr(getattr(pipe, "vae", None), "decode"):
        raise _Unfit("it has no `vae` that decodes to pictures")
    call = dict(options.pop("call", None) or {})
    size = {k: options[k] for k in ("height", "width") if options.get(k) is not None}
    if size and takes(pipe, "use_resolution_binning"):
        call.setdefault("use_resolution_binning", False)
    straight, noise = _straight(pipe)
    cfg = "true_cfg_scale" if takes(pipe, "true_cfg_scale") else "guidance_scale"
    try:
        base, off = _unguided(pipe, network, straight, {**size, **call}, cfg)
        state, time = names_of(base)
        said: dict[str, Any] = {
            "network_name": name, "state_argument": state, "time_argument": time,
            "cfg_argument": cfg if off is not None else None,
            "adapter_targets": tuple(t for t in TARGETS if _has(network, t)),
        }  # fmt: skip
        steps, shown = steps_of(base, state, time), base
        if not noise:
            levels = base.scheduler.sigmas.double().cpu()
            said |= {"levels": levels_of(levels, [s.time for s in steps])}
            said |= {"sign": sign_of(steps, levels)}
        if off is not None:
            said["no_cfg"] = off
            if cfg == "true_cfg_scale" and takes(pipe, "guidance_scale"):
                said["guidance_argument"] = "guidance_scale"
            scale = options.get("cfg") or default_of(pipe, cfg)
            if scale is not None and scale != off:
                asked = {**size, **call, cfg: scale}
                asked |= _negative(options, asked, cfg)
                shown = watch(pipe, network, straight, asked)
                guided = implied(steps_of(shown, state, time), shown, said, noise)
                said |= mixing_of(guided, scale)
                if said["cfg_argument"] is not None:
                    options.setdefault("cfg", scale)
    except _Unfit:
        raise
    except ValueError as error:
        raise _Unfit(str(error)) from error
    return _proved(pipe, said, {**options, "call": call}, shown, noise)


def _denoiser(pipe: Any) -> tuple[str, Any]:
    for name in ("transformer", "unet"):
        if isinstance(getattr(pipe, name, None), nn.Module):
            return name, getattr(pipe, name)
    raise _Unfit("it has neither a `transformer` nor a `unet`")


def _has(network: nn.Module, end: str) -> bool:
    return any(name.endswith(f".{end}") for name, _ in network.named_modules())


def _negative(options: Mapping[str, Any], call: Mapping[str, Any], cfg: str) -> dict[str, Any]:
    said = options.get("negative_prompt")
    if said is None and cfg == "true_cfg_scale":
        said = str(call.get("negative_prompt") or "")  # else it does not guide
    return {} if said is None else {"negative_prompt": said}


def _straight(pipe: Any) -> tuple[Any, bool]:
    """Return a scheduler with the flow's Euler step, and whether the denoiser predicts noise."""
    diffusers = needs_diffusers()
    own = getattr(pipe, "scheduler", None)
    config = dict(getattr(own, "config", None) or {})
    kind = type(own).__name__
    if kind == "FlowMatchEulerDiscreteScheduler":
        return own, False
    if config.get("use_flow_sigmas") or "FlowMatch" in kind:
        shift = config.get("flow_shift") or config.get("shift") or 1.0
        return diffusers.FlowMatchEulerDiscreteScheduler(shift=shift), False
    if hasattr(own, "alphas_cumprod") and config.get("prediction_type") in (
        "epsilon", "v_prediction", "sample",
    ):  # fmt: skip
        plain = {
            "set_alpha_to_one": True, "clip_sample": False, "thresholding": False,
            "timestep_spacing": "trailing",
        }  # fmt: skip
        return diffusers.DDIMScheduler.from_config(config, **plain), True
    raise _Unfit(f"its scheduler ({kind}) says neither noise levels of a flow nor alphas_cumprod")


def _unguided(
    pipe: Any, network: nn.Module, scheduler: Any, call: dict[str, Any], cfg: str
) -> tuple[Watched, float | None]:
    """Return a run without guidance, and the scale that switches it off; None: no guidance."""
    if not takes(pipe, cfg):
        return watch(pipe, network, scheduler, call), None
    for off in (1.0, 0.0):
        seen = watch(pipe, network, scheduler, {**call, cfg: off})
        state, time = names_of(seen)
        if all(len(step.predictions) == 1 for step in steps_of(seen, state, time)):
            return seen, off
    raise _Unfit("it calls its denoiser twice per step, for any guidance scale")


def _proved(
    pipe: Any, said: dict[str, Any], options: dict[str, Any], shown: Watched, noise: bool
) -> PipelineFlow:
    """Return the flow whose states and pictures equal the pipeline's."""
    kind = GenericNoise if noise else Generic
    steps = steps_of(shown, said["state_argument"], said["time_argument"])
    problems = []
    for layout in LAYOUTS.get(steps[0].state.ndim, ()):
        made = type(f"{type(pipe).__name__}Flow", (kind,), {**said, "layout": layout})
        flow: PipelineFlow = made(pipe, **options)
        problem = _difference(flow, steps, shown, noise)
        if problem is None:
            return flow
        problems.append(problem)
    shape = tuple(steps[0].state.shape)
    raise _Unfit("; ".join(dict.fromkeys(problems)) or f"its states have the shape {shape}")


def _difference(flow: Any, steps: list[Found], shown: Watched, noise: bool) -> str | None:
    """Return how a flow differs from the run of its pipeline; None if it does not."""
    bound = bound_of(steps[0].state.dtype)
    view = flow.given([PROMPT])
    times, x = list(_times(view, steps, shown, noise)), steps[0].state.float()
    with torch.no_grad():
        norm = [times[0]] * len(x)
        x = x / _norms(norm, x, noise)
        for i, (s, t) in enumerate(pairwise(times)):
            x = view.jump(x, s, t)
            if i + 1 < len(steps):
                off = error_of(x * _norms([t], x, noise), steps[i + 1].state)
                if off > bound:
                    return f"its step {i + 1} is not an Euler step of the flow ({off:.1%} off)"
        try:
            made = view.frames(x).clamp(0, 1)
        except (RuntimeError, ValueError) as error:
            return f"its states are not decoded as {flow.layout} ({str(error).splitlines()[0]})"
    wanted = torch.as_tensor(shown.pictures)
    if made.ndim == 5 and wanted.ndim == 5 and wanted.shape[2] == 3:
        made = made.transpose(1, 2)
    if made.shape != wanted.shape:
        return f"its pictures are {tuple(wanted.shape)}, and decode's {tuple(made.shape)}"
    off = error_of(made, wanted.to(made))
    return None if off <= bound else f"its pictures are {off:.1%} different from those of decode"


def _times(flow: Any, steps: list[Found], shown: Watched, noise: bool) -> Iterator[float]:
    """Return the run's times in this package's convention, with 1 at the end."""
    if not noise:
        yield from (1 - float(s) for s in shown.scheduler.sigmas.double())
        return
    flow.first_step = steps[0].time
    for step in steps:
        a, s = signal_of(shown.scheduler, step.time)
        yield a / (a + s)
    yield 1.0


def _norms(times: list[float], x: Tensor, noise: bool) -> Tensor:
    """Return the factors from states of the flow to those of the pipeline."""
    t = x.new_tensor(times)
    found = (t**2 + (1 - t) ** 2).rsqrt() if noise else torch.ones_like(t)
    return found.view(-1, *[1] * (x.ndim - 1))
