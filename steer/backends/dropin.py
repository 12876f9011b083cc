"""Reward guidance for scripts that call a pipeline themselves: a callback in its loop."""

import inspect
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from steer.backends.checks import dtype_of
from steer.backends.conditions import Condition, Rows
from steer.backends.folders import needs_diffusers
from steer.backends.noise_prediction import StableDiffusion
from steer.backends.pipeline import PipelineFlow
from steer.backends.recording import instead
from steer.backends.source import at_one_time
from steer.backends.table import family_of
from steer.doors import as_reward
from steer.guidance.ascent import whole_reward
from steer.guidance.control import direction, row_norm
from steer.path import like
from steer.ranges import finite
from steer.reward import Rest, Reward, plain

needs_diffusers()

from diffusers.callbacks import PipelineCallback  # noqa: E402  pipelines look for its kind

__all__ = ["RewardGuidance"]


class RewardGuidance(PipelineCallback):
    """Guide a pipeline by the reward of its lookahead: `fmrg-j` in the pipeline's own loop.

    `pipe(prompt, callback_on_step_end=steer.RewardGuidance(reward, pipe=pipe))`. After each step
    from s to t the state moves by `scale |X(s,t,x) - x| g / |g|`, `g = ∇ reward(X(s,1,x))`, theory
    (47): what `steer.FlowMapControl` does. It costs one denoiser call per step, forward and
    backward, and no text encoding: the denoiser's inputs are taken from the pipeline's own calls.
    At scale 0 nothing is changed.

    A pipeline that ignores what the callback returns, or that has no such argument (PRX,
    DreamLite), is guided through its scheduler: `with guidance.around(pipe): pipe(prompt)`.

    Args:
        reward: a Reward, or any callable on images (n, 3, h, w).
        scale: length of the gradient step relative to the pipeline's step.
        pipe: the pipeline. Default: detected when the pipeline reads `tensor_inputs`. Some
            pipelines do not (FLUX, Qwen-Image, Z-Image) and must be given.
        prompts: prompts for the reward, if it needs them: one, or one for each prompt.
        cfg: the guidance scale, if the pipeline's call has it as `true_cfg_scale`.

    Raises:
        ValueError: a scale that is negative or not finite; at the first step a pipeline that is
            not of a known family or is in training mode, a reward without gradient, or an unknown
            guidance scale.
    """

    def __init__(
        self,
        reward: Reward | Callable[..., Tensor] | str,
        scale: float = 0.3,
        *,
        pipe: Any = None,
        prompts: Sequence[str] | str | None = None,
        cfg: float | None = None,
    ) -> None:
        finite("scale", scale)
        if scale < 0:
            raise ValueError(
                f"scale must not be negative, got {scale}: a negative scale would lower the reward"
            )
        self.reward, self.scale, self.cfg = as_reward(reward), scale, cfg
        self.prompts = [prompts] if isinstance(prompts, str) else prompts
        self.pipe: Any = None
        self._calls: list[dict[str, Any]] = []
        self._hook: Any = None
        if pipe is not None:
            self.attach(pipe)

    @property
    def tensor_inputs(self) -> list[str]:
        """What a pipeline passes after each step; reading this attribute attaches the pipeline."""
        if self.pipe is None:
            asking = sys._getframe(1).f_locals.get("self")
            if asking is not None:
                self.attach(asking)
        return ["latents"]

    def attach(self, pipe: Any) -> None:
        """Record the calls of a pipeline's denoiser, whose arguments a lookahead needs.

        Raises:
            ValueError: a pipeline of no known family, or one that is in training mode.
        """
        self.remove()
        kind = family_of(pipe)
        if kind is None:
            raise ValueError(
                f"{type(pipe).__name__} is not a family that is known by name (docs/models.md): "
                "use steer.sample(pipe, reward, ...), which analyses the pipeline"
            )
        network: nn.Module = getattr(pipe, kind.network_name)
        if network.training:
            raise ValueError(
                f"the pipeline's {kind.network_name} is in training mode, where dropout changes "
                f"pictures: call pipe.{kind.network_name}.eval() first"
            )
        self.pipe, self.kind = pipe, kind
        self._signature = inspect.signature(network.forward)
        self._hook = network.register_forward_pre_hook(self._see, with_kwargs=True)

    @contextmanager
    def around(self, pipe: Any) -> Iterator[None]:
        """Guide a pipeline without a callback through its scheduler, for one call."""
        self.attach(pipe)
        scheduler, step, count = pipe.scheduler, pipe.scheduler.step, itertools.count()

        def guided(*args: Any, **kwargs: Any) -> Any:
            made = step(*args, **kwargs)
            latents = made[0] if isinstance(made, tuple) else made.prev_sample
            moved = self(pipe, next(count), None, {"latents": latents})["latents"]
            if isinstance(made, tuple):
                return (moved, *made[1:])
            made.prev_sample = moved
            return made

        try:
            with instead(scheduler, "step", guided):
                yield
        finally:
            self.remove()

    def into(self, pipe: Any) -> Any:
        """Return a modular pipeline (FLUX.3) with this guidance as a block of its denoising loop.

        A diffusers guider cannot do this: it sees neither the latents nor the autoencoder.

        Raises:
            ValueError: the pipeline is not modular: give this as `callback_on_step_end`.
        """
        if not hasattr(pipe, "blocks"):
            raise ValueError(
                f"{type(pipe).__name__} is not modular, it has no blocks: call it with "
                "callback_on_step_end, or in `with guidance.around(pipe)`"
            )
        from steer.backends.dropin_block import with_guidance

        return with_guidance(pipe, self)

    def remove(self) -> None:
        """Stop recording the denoiser's calls."""
        if self._hook is not None:
            self._hook.remove()
        self._hook, self.pipe = None, None

    def _see(self, network: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if not torch.is_grad_enabled():  # our own calls are not recorded
            found = dict(self._signature.bind(*args, **kwargs).arguments)
            found |= found.pop("kwargs", {})
            found.pop("return_dict", None)
            self._calls = [*self._calls[-1:], found]  # a step has at most two

    def callback_fn(
        self, pipeline: Any, step_index: int, timesteps: Any, callback_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Return the pipeline's variables, the latents moved."""
        calls, self._calls = self._calls, []
        if self.pipe is None:
            raise ValueError(
                f"{type(pipeline).__name__} does not pass itself before its first step: give it, "
                "steer.RewardGuidance(reward, pipe=pipe)"
            )
        if len(calls) == 2 and not at_one_time(*(c[self.kind.time_argument] for c in calls)):
            calls = calls[1:]  # the first belongs to another call of the pipeline
        if self.scale and calls:
            moved = self._moved(callback_kwargs["latents"], step_index, calls)
            callback_kwargs["latents"] = moved
        return callback_kwargs

    def _moved(self, latents: Tensor, step: int, calls: list[dict[str, Any]]) -> Tensor:
        flow, x = self._view(calls, len(latents))
        grid = flow.grid()
        s, t = 0.0 if step == 0 else grid[step], grid[step + 1]
        flow.hear(grid)
        if isinstance(flow, StableDiffusion):
            x = x * (s**2 + (1 - s) ** 2) ** 0.5
        factor = _latents_of(flow, step + 1, t)
        y = latents.float() / factor
        if y.shape != x.shape:
            raise ValueError(
                f"the pipeline's latents are {tuple(y.shape)} and its denoiser's states "
                f"{tuple(x.shape)}: call steer.sample(pipe, reward, ...) instead"
            )
        potential = whole_reward(flow, self.reward, self.prompts)
        with plain(Rest(flow, self.reward)), torch.no_grad():
            gradient = potential.evaluate(x, s, derivatives=True).gradient
            assert gradient is not None
            there = flow.jump(x, s, t) if flow.churn else y  # a re-noised state is not a jump
            push = like(self.scale * row_norm(there - x), x) * direction(gradient)
        return latents + (push * factor).to(latents.dtype)

    def _view(self, calls: list[dict[str, Any]], n: int) -> tuple[PipelineFlow, Tensor]:
        """Return the flow bound to the denoiser's recorded arguments, and states (n, *event)."""
        scale = self._scale_of_guidance()
        whole = self.kind(self.pipe, cfg=scale)
        told, negative = calls[0], None
        rows = len(whole.state_of(told))
        if rows == 2 * n:  # both prompts in one batch
            parts = [_half(told, n, rows, k) for k in (0, 1)]
            told, negative = parts if whole.prompt_first else parts[::-1]
        elif len(calls) > 1:
            negative = calls[1]
        if negative is not None and scale is None and self.kind.cfg_argument is not None:
            raise ValueError(
                "the pipeline mixes guidance at a scale that cannot be read from it: give it, "
                "steer.RewardGuidance(reward, pipe=pipe, cfg=4.0)"
            )
        x = whole.state_of(told).detach().float()
        view = whole._view()
        kept = whole.kept(told)
        against = None if negative is None else whole.kept(negative)
        view._conditions = [Condition(kept, against, tuple(x.shape[1:]), x.dtype)]
        key = len(x), x.device, dtype_of(view.network), id(view._conditions)
        view._rows = key, [Rows(None, kept, against)]
        view.patches_told = _patches_told(told)
        return view, x

    def _scale_of_guidance(self) -> float | None:
        if self.cfg is not None:
            return self.cfg
        if self.kind.cfg_argument != "guidance_scale":
            return None
        scale = getattr(self.pipe, "guidance_scale", None)
        on = getattr(self.pipe, "do_classifier_free_guidance", True)
        return float(scale) if scale is not None and on else self.kind.no_cfg


def _latents_of(flow: PipelineFlow, step: int, t: float) -> float:
    """Return the factor from a flow's state to the pipeline's latents at a step."""
    scheduler = flow.source.pipe.scheduler
    if isinstance(flow, StableDiffusion):
        sigmas = getattr(scheduler, "sigmas", None)
        if sigmas is not None and len(sigmas) == len(scheduler.timesteps) + 1:
            return 1.0 + float(sigmas[step])
        return (t**2 + (1 - t) ** 2) ** -0.5
    if type(flow).__name__ == "SanaSprint":
        angle = scheduler.timesteps[step].double()
        return float(scheduler.config.sigma_data * (angle.cos() + angle.sin()))
    return 1.0


def _half(value: Any, n: int, rows: int, k: int) -> Any:
    """Return the first or second n of the rows of arguments."""
    if isinstance(value, dict):
        return {name: _half(v, n, rows, k) for name, v in value.items()}
    if isinstance(value, Tensor) and value.ndim and len(value) == rows:
        return value[k * n : (k + 1) * n]
    if isinstance(value, list) and len(value) == rows:
        return value[k * n : (k + 1) * n]
    return value


def _patches_told(arguments: dict[str, Any]) -> tuple[int, int] | None:
    """Return the rows and columns of patches that position ids or shapes imply."""
    ids, shapes = arguments.get("img_ids"), arguments.get("img_shapes")
    if isinstance(ids, Tensor):
        flat = ids.reshape(-1, ids.shape[-1])
        return len(flat[:, 1].unique()), len(flat[:, 2].unique())
    if isinstance(shapes, list) and shapes:
        _, height, width = shapes[0][0] if isinstance(shapes[0], list) else shapes[0]
        return int(height), int(width)
    return None
