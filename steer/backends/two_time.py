"""Pipelines whose denoiser takes two times: flow maps, `X(s,t,x)` for any s <= t in one call."""

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from steer.backends.checks import dtype_of
from steer.backends.pipeline import Kind, PipelineFlow
from steer.backends.target_time import TargetTime, fill, is_blank

__all__ = ["AnyFlow", "Flux3", "HunyuanImage"]


class Flux3(PipelineFlow):
    """FLUX.3: Klein is a flow map, the base a velocity with classifier-free guidance.

    Both times are noise levels in [0, 1]. It exists only as a modular pipeline; load it without
    the prompt upsampler, which is a separate language model (`steer.load` does so).

    `steer distill` makes a map of a base by training the missing embedder of the jump's end, see
    `steer.backends.target_time`. A base whose transformer was loaded with `flow_map=True` gets an
    untrained embedder, with a warning: its jumps are Euler steps.
    """

    layout = "tokens"
    shared = frozenset({"img_ids", "txt_ids"})
    cfg_argument = None
    prompt_first = True
    adapter_targets = ("to_q", "to_k", "to_v", "to_out.0", "linear_in", "linear_out")

    def __init__(self, pipe: Any, **options: Any) -> None:
        self.is_map = bool(pipe.transformer.config.flow_map)
        if is_blank(pipe.transformer):
            fill(pipe.transformer)
            warnings.warn(
                "this FLUX.3 transformer is a flow map (flow_map=True) read from a file without "
                "target_timestep_embedder, a base's: it has an untrained one now, so every "
                "jump is one Euler step. Train it with `steer distill`, or load Klein",
                stacklevel=2,
            )
        super().__init__(pipe, **options)
        self.target_argument = "target_timestep" if self.is_map else None  # type: ignore[misc]

    def _second_time(self, given: Any) -> Any:
        if not isinstance(given, TargetTime):
            return super()._second_time(given)
        given.check(self.network)
        return given.to(next(self.network.parameters()).device)

    def fresh_term(self) -> TargetTime:
        """Return the embedder of the jump's end that `steer distill` trains."""
        return TargetTime.fresh(self.network)

    def found_kind(self) -> Kind:
        """Return "two-time" for Klein, "velocity" for the base."""
        return "two-time" if self.is_map else "velocity"

    @property
    def mixes(self) -> bool:
        """Whether the pipeline has a guider: the base has one."""
        return not self.is_map and getattr(self.source.pipe, "guider", None) is not None

    def default_cfg(self) -> float | None:
        """Return the guider's scale."""
        return float(self.source.pipe.guider.config.guidance_scale)

    def arguments_of_call(self, prompt: str, steps: int) -> dict[str, Any]:
        """Return the call's arguments; the scale is the guider's."""
        known = super().arguments_of_call(prompt, steps)
        return known if self.cfg is None else known | self._negative(known)

    def grid_of(self, steps: int) -> list[float]:
        """Return the pipeline's times: equal steps of the noise level, as in its scheduler.

        A modular pipeline encodes its prompt in each call, so this is computed without a call.
        """
        scheduler = copy.deepcopy(self.source.pipe.scheduler)
        scheduler.set_timesteps(sigmas=[1 - k / steps for k in range(steps)])
        return [1.0 - float(s) for s in scheduler.sigmas.double()]

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """Use a guider with this flow's scale, and restore the pipeline's own afterwards."""
        pipe = self.source.pipe
        if not self.mixes:
            yield
            return
        from diffusers import ClassifierFreeGuidance

        own = pipe.guider
        pipe.update_components(guider=ClassifierFreeGuidance(guidance_scale=self.cfg or 1.0))
        try:
            yield
        finally:
            pipe.update_components(guider=own)

    def kept(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments without both times."""
        return {k: v for k, v in super().kept(arguments).items() if k != "target_timestep"}


class HunyuanImage(PipelineFlow):
    """HunyuanImage-2.1: the distilled model is a map with the next time and guidance as inputs."""

    time_scale = 1000.0
    cfg_argument = None
    guidance_argument = "distilled_guidance_scale"

    def __init__(self, pipe: Any, **options: Any) -> None:
        self.is_map = bool(pipe.transformer.config.use_meanflow)
        super().__init__(pipe, **options)
        self.target_argument = "timestep_r" if self.is_map else None  # type: ignore[misc]
        if not self.is_map and self.source.pipe.guider is not None:
            raise ValueError(
                "this HunyuanImage is guided by adaptive projected guidance, whose prediction "
                "depends on the steps before it, so it has no velocity: take the distilled one, "
                "or drop the guider, pipe.guider = None"
            )

    def found_kind(self) -> Kind:
        """Return "two-time" for the distilled one."""
        return "two-time" if self.is_map else "velocity"

    def kept(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments without both times."""
        return {k: v for k, v in super().kept(arguments).items() if k != "timestep_r"}

    def evaluate(self, x: Tensor, arguments: dict[str, Any]) -> Tensor:
        """Call the transformer with times in its own precision, in which it embeds them."""
        names = (self.time_argument, self.target_argument)
        times = {k: arguments[k].to(dtype_of(self.network)) for k in names if k is not None}
        return super().evaluate(x, {**arguments, **times})


class AnyFlow(PipelineFlow):
    """AnyFlow: a map of clips, (frames, c, h, w), with a time for each frame."""

    target_argument = "r_timestep"
    time_scale = 1000.0
    layout = "frames"
    output = "frames"

    def found_kind(self) -> Kind:
        """Return "two-time"."""
        return "two-time"

    def network_time(self, t: Tensor) -> Tensor:
        """Return the same time for each frame, (n, frames)."""
        return super().network_time(t)[:, None].expand(-1, self.event_shape[0])
