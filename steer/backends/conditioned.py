"""How conditioning is obtained from a pipeline: prompts, resolution, guidance, times."""

import copy
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Literal, Self

from torch import Tensor, nn

from steer.backends.checks import (
    check_arguments,
    check_precision,
    check_signature,
    check_size,
    default_of,
    multiple_of,
    takes,
)
from steer.backends.conditions import Condition, Rows
from steer.backends.glimpse import Glimpse
from steer.backends.latents import Layout
from steer.backends.recording import Recorder
from steer.backends.second_time import SecondTime
from steer.backends.source import Source
from steer.flow import FlowMap
from steer.path import Linear, step_times

__all__ = ["Conditioned", "Kind"]

Kind = Literal["two-time", "one-jump", "velocity"]


class Conditioned(FlowMap):
    """A pipeline at a resolution and a guidance scale, prompts bound or not; see `PipelineFlow`.

    A family of pipelines sets the class attributes.
    """

    network_name: ClassVar[str] = "transformer"
    state_argument: ClassVar[str] = "hidden_states"
    time_argument: ClassVar[str] = "timestep"
    target_argument: ClassVar[str | None] = None
    time_scale: float = 1.0
    sign: ClassVar[float] = -1.0
    layout: Layout = "grid"
    shared: ClassVar[frozenset[str]] = frozenset()
    """Arguments of the denoiser that have no batch axis, although their shapes may suggest one."""
    cfg_argument: ClassVar[str | None] = "guidance_scale"
    no_cfg: ClassVar[float] = 1.0
    guidance_argument: ClassVar[str | None] = None
    prompt_first: ClassVar[bool] = False
    """Whether a batch of both prompts has the negative one last."""
    from_prompt: ClassVar[bool] = False
    """Whether guidance starts from the prompt's prediction: `c + scale (c - u)`."""
    epsilon: ClassVar[float | None] = None
    time_embedding: ClassVar[str | None] = None
    """The denoiser's module that a second time can be added to, see `SecondTime`."""
    lora_loader: ClassVar[str] = "pipeline"
    """What loads a LoRA file in diffusers: "pipeline", "denoiser", or "" if neither works."""
    output: ClassVar[str] = "images"
    adapter_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")

    def __init__(
        self,
        pipe: Any,
        *,
        height: int | None = None,
        width: int | None = None,
        cfg: float | None = None,
        guidance: float | None = None,
        negative_prompt: str | None = None,
        kind: Kind | None = None,
        frame: int | None = None,
        checkpointing: bool = False,
        second_time: SecondTime | str | os.PathLike[str] | None = None,
        guide_vae: Any = None,
        guide_size: float | None = None,
        guide_crop: int | None = None,
        decode_rows: int | None = None,
        call: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.path = Linear()
        self.network, self.vae = getattr(pipe, self.network_name), pipe.vae
        check_signature(
            self.network, self.state_argument, self.time_argument, self.target_argument
        )
        self.component = self.network_name
        self.second_time = self._second_time(second_time)
        self.source = Source(pipe, Recorder(pipe, self.network, self.state_argument))
        self.name = self.source.name
        told: Kind | None = None if self.second_time is None else "two-time"
        self.kind = kind or told or self.found_kind()
        self.churn = self.found_churn()
        self.height, self.width, self.frame = height, width, frame
        self.negative_prompt, self.checkpointing = negative_prompt, checkpointing
        self.glimpse = Glimpse.of(guide_vae, guide_size, guide_crop, decode_rows)
        self.call_arguments = dict(call or {})
        self.cfg, self.guidance = self._mixed_at(cfg), guidance
        self.evaluations = 1 if self.cfg is None else 2
        if guidance is not None and self.guidance_argument is None:
            raise ValueError(
                f"{type(self.network).__name__} was not distilled with a guidance scale: give "
                "cfg, which mixes two evaluations, or leave guidance out"
            )
        check_arguments(pipe, self.call_arguments)
        check_precision(self.network)
        self.check_size()
        self._conditions: list[Condition] | None = None
        self._rows: tuple[Any, list[Rows]] | None = None

    def _second_time(self, given: Any) -> Any:
        if given is None:
            return None
        term = given if isinstance(given, SecondTime) else SecondTime.load(given)
        if self.target_argument is not None:
            raise ValueError(
                f"{type(self).__name__} knows two times by itself: leave second_time out"
            )
        term.check(self.network)
        return term.to(next(self.network.parameters()).device)

    def with_second_time(self, term: Any) -> Self:
        """Return the same flow with a `SecondTime` for the end of its jumps; None: without one.

        No prompts are bound, and no guidance is mixed: a map has it distilled in its weights.
        """
        view = self._view()
        view.second_time = self._second_time(term)
        view.kind = self.found_kind() if term is None else "two-time"
        view.cfg, view.evaluations, view._conditions = None, 1, None
        return view

    # ------------------------------------------------------------ what the model is

    def found_kind(self) -> Kind:
        """Return the kind of model that the pipeline's files declare."""
        return "velocity" if self.target_argument is None else "two-time"

    def found_churn(self) -> float:
        """Return how far the pipeline's own sampler re-noises."""
        return 0.0

    @property
    def pipe(self) -> Any:
        """The diffusers pipeline itself."""
        return self.source.pipe

    @property
    def denoiser(self) -> nn.Module:
        """The pipeline's denoiser."""
        return self.network

    @property
    def about(self) -> Mapping[str, Any]:
        """How a card says that adapters are loaded: class, component, loader, output."""
        pipe, reader = self.source.pipe, self.lora_loader
        if reader == "pipeline" and not hasattr(pipe, "load_lora_weights"):
            reader = "denoiser"
        return {
            "pipeline": type(pipe).__name__, "component": self.component, "lora_loader": reader,
            "output": self.output,
        }  # fmt: skip

    @property
    def lacks(self) -> Mapping[str, str]:
        """What this flow cannot do at present ("gradient", "velocity") -> why."""
        if self.kind != "one-jump":
            return self.source.lacks
        return {
            **self.source.lacks,
            "velocity": (
                "this one is a student that was trained for its jumps: its prediction replaces "
                "the velocity, so the method is not exact. Use the velocity of its base, "
                "steer.Pair(base, student)"
            ),
        }

    def __repr__(self) -> str:
        """Describe the flow in one line; `flow.network` prints every layer."""
        scale = "" if self.cfg is None else f", cfg {self.cfg:g}"
        return (
            f"{type(self).__name__}({self.name or type(self.source.pipe).__name__}, {self.kind}, "
            f"{len(self._conditions or [])} prompts bound{scale})"
        )

    # ------------------------------------------------------------ prompts and sizes

    def given(self, prompts: Sequence[str]) -> Self:
        """Bind p prompts: the result takes p * n rows, prompt-major.

        Each prompt is encoded by the pipeline, the first time that it is seen.

        Raises:
            TypeError: a text instead of a list.
            ValueError: no prompt at all.
        """
        if isinstance(prompts, str):
            raise TypeError(f"prompts are a list: write given([{prompts!r}])")
        if not prompts:
            raise ValueError('no prompts to bind: give at least one, [""] for none')
        view = self._view()
        view._conditions = [self.source.condition(self, str(p)) for p in prompts]
        return view

    def bound_to(self, conditions: Sequence[Condition]) -> Self:
        """Bind existing conditions, one for each prompt."""
        view = self._view()
        view._conditions = list(conditions)
        return view

    def sized(self, height: int, width: int) -> Self:
        """Return the same flow at another resolution, no prompts bound."""
        view = self._view()
        view.height, view.width, view._conditions = height, width, None
        view.check_size()
        return view

    def guided(self, scale: float, negative: str | None = None) -> Self:
        """Return the same flow with classifier-free guidance mixed at run time, no prompts bound.

        Raises:
            ValueError: the pipeline has no such guidance.
        """
        view = self._view()
        view.cfg, view.negative_prompt, view._conditions = None, negative, None
        view.cfg = view._mixed_at(scale)
        view.evaluations = 1 if view.cfg is None else 2
        return view

    def release_text_encoders(self) -> None:
        """Release the pipeline's text encoders; only prompts encoded before can then be bound."""
        self.source.recorder.release()

    @property
    def event_shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """The shape of one state, at this resolution."""
        if self._conditions is not None:
            return self._conditions[0].shape
        return self.source.condition(self, self.source.known_prompt).shape

    def times(self, steps: int, start: float = 0.0) -> list[float]:
        """Return the pipeline's own times for `steps` steps from `start` to 1, shifted as it does.

        With a start above 0, they are the last `steps` times of the longest grid with that many
        times after the start, as in diffusers' image-to-image pipelines. With a `second_time` the
        steps are equal: other schedulers place the last step just before the data.
        """
        if self.second_time is not None:
            return step_times(steps, start)
        if start <= 0:
            return [0.0, *self.source.grid(self, steps)[1:]]
        whole = steps
        while True:
            after = [t for t in self.source.grid(self, whole) if t > start + 1e-6]
            if len(after) >= steps:
                return [start, *after[-steps:]]
            whole += 1

    def _bound(self) -> list[Condition]:
        if self._conditions is None:
            return [self.source.condition(self, "")]
        return self._conditions

    def _view(self) -> Self:
        view = copy.copy(self)
        view._modules = dict(self._modules)
        view._rows = None
        return view

    # ------------------------------------------------------------ how the pipeline is called

    def arguments_of_call(self, prompt: str, steps: int) -> dict[str, Any]:
        """Return the arguments of the pipeline's call that records a prompt."""
        size = {"height": self.height, "width": self.width}
        known: dict[str, Any] = {k: v for k, v in size.items() if v is not None}
        if known and takes(self.source.pipe, "use_resolution_binning"):
            known["use_resolution_binning"] = False  # exactly the requested size
        known |= self.call_arguments
        if self.guidance_argument is not None and self.guidance is not None:
            known[self.guidance_argument] = self.guidance
        if self.cfg_argument is not None:
            known[self.cfg_argument] = self.no_cfg if self.cfg is None else self.cfg
        if self.cfg is not None:
            known |= self._negative(known)
        return {"prompt": prompt, "num_inference_steps": steps, **known}

    def _negative(self, known: Mapping[str, Any]) -> dict[str, str]:
        """Return the negative prompt, if one was given; else the pipeline decides.

        SDXL then uses zeros. With `true_cfg_scale`, guidance needs one: it gets an empty one.
        """
        said = self.negative_prompt
        if said is None and self.cfg_argument == "true_cfg_scale":
            said = str(known.get("negative_prompt") or "")
        return {} if said is None else {"negative_prompt": said}

    def prepared(self) -> AbstractContextManager[None]:
        """Return the context of the call that records a prompt. Default: an empty one."""
        return nullcontext()

    def state_of(self, arguments: Mapping[str, Any]) -> Tensor:
        """Return the noisy state among recorded arguments."""
        return arguments[self.state_argument]

    def kept(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return recorded arguments without the state and the times."""
        gone = {self.state_argument, self.time_argument, self.target_argument}
        return {k: v for k, v in arguments.items() if k not in gone}

    def grid_of(self, steps: int) -> list[float] | None:
        """Return the times of a number of steps if they are known without a call."""
        return None

    def grid(self) -> list[float]:
        """Return the times of the scheduler's current grid."""
        return [1.0 - float(s) for s in self.source.pipe.scheduler.sigmas.double()]

    def default_cfg(self) -> float | None:
        """Return the pipeline's default guidance scale."""
        return default_of(self.source.pipe, self.cfg_argument)

    def _mixed_at(self, cfg: float | None) -> float | None:
        """Return the scale of the guidance that is mixed at run time; None: no guidance."""
        if not self.mixes:
            if cfg is not None:
                raise ValueError(
                    f"{type(self.source.pipe).__name__} mixes no classifier-free guidance: leave "
                    "cfg out" + (", and give guidance" if self.guidance_argument else "")
                )
            return None
        if cfg is None and self.kind == "velocity":
            cfg = self.default_cfg()
        return None if cfg is None or cfg == self.no_cfg else float(cfg)

    @property
    def mixes(self) -> bool:
        """Whether the pipeline mixes classifier-free guidance."""
        return self.cfg_argument is not None

    @property
    def multiple(self) -> int:
        """The number that height and width must be multiples of."""
        patches = self.layout in ("tokens", "patches")
        return multiple_of(self.source.pipe, self.network, patches)

    def check_size(self) -> None:
        """Refuse a height or a width that the model does not take."""
        check_size(self.source.pipe, self.height, self.width, self.multiple)
