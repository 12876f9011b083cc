"""What all views of one pipeline share: the pipeline itself and its recordings."""

from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Self

import torch
from torch import nn

from steer.backends.checks import dtype_of
from steer.backends.conditions import Condition, dtypes_of, halves
from steer.backends.quantised import unsound
from steer.backends.recording import Recorder, modules_of

__all__ = ["Source", "at_one_time"]

KEPT = 64
"""Number of prompts whose conditions are cached, while they can be recomputed."""

STEPS = 4
"""Number of steps of the call that records a prompt: any number works."""


class Source:
    """A pipeline and its recordings. A copy of a flow has the same one: it is never copied.

    If a method takes a flow, it is the `PipelineFlow` whose options are used for the pipeline's
    call.

    Args:
        pipe: the pipeline.
        recorder: recorder of its denoiser's calls.
    """

    def __init__(self, pipe: Any, recorder: Recorder) -> None:
        self.pipe, self.recorder = pipe, recorder
        self._conditions: OrderedDict[str, Condition] = OrderedDict()
        self._grids: dict[str, list[float]] = {}
        self._prompts: dict[str, None] = {}

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    @property
    def name(self) -> str:
        """Where the pipeline was loaded from: a hub id or a folder."""
        config = dict(getattr(self.pipe, "config", None) or {})
        modular = getattr(self.pipe, "_pretrained_model_name_or_path", None)
        return str(config.get("_name_or_path") or modular or "")

    @property
    def lacks(self) -> dict[str, str]:
        """What the pipeline cannot do in its current state -> why."""
        parts = modules_of(self.pipe).items()
        hooked = [name for name, part in parts if any(map(_offloads, part.modules()))]
        if not hooked:
            return {"gradient": self._unsound} if self._unsound else {}
        return {
            "gradient": (
                f"the pipeline's {', '.join(hooked)} is offloaded, which removes weights before "
                "the backward pass needs them: put the whole pipeline on one device, "
                "pipe.to('cuda'), without enable_model_cpu_offload, and save memory with "
                "steer.load(pipe, checkpointing=True)"
            )
        }

    @cached_property
    def _unsound(self) -> str:
        return unsound(self.recorder.network)

    def condition(self, flow: Any, prompt: str) -> Condition:
        """Return a prompt's condition, recorded on first use."""
        key = repr(sorted(flow.arguments_of_call(prompt, 0).items(), key=str))
        if key not in self._conditions:
            found, grid = self._record(flow, prompt, STEPS)
            self._conditions[key] = found
            self._grids.setdefault(self._key(flow, STEPS), grid)
            if len(self._conditions) > KEPT and not self.recorder.released:
                self._conditions.popitem(last=False)
        return self._conditions[key]

    @property
    def known_prompt(self) -> str:
        """A prompt that was recorded before and needs no text encoder; None if there is none."""
        return next(iter(self._prompts), "")

    def grid(self, flow: Any, steps: int) -> list[float]:
        """Return the pipeline's times of `steps` steps, at the flow's resolution."""
        key = self._key(flow, steps)
        if key not in self._grids:
            told = flow.grid_of(steps)
            self._grids[key] = told or self._record(flow, self.known_prompt, steps)[1]
        return list(self._grids[key])

    def grid_like(self, times: Sequence[float]) -> list[float] | None:
        """Return the recorded grid whose times after the first are these, if there is one."""
        later = list(times)[1:]
        return next((grid for grid in self._grids.values() if grid[1:] == later), None)

    @staticmethod
    def _key(flow: Any, steps: int) -> str:
        return repr((steps, sorted(flow.arguments_of_call("", 0).items(), key=str)))

    def _record(self, flow: Any, prompt: str, steps: int) -> tuple[Condition, list[float]]:
        """Record a prompt, and the grid of `steps` steps, by one call of the pipeline."""
        flow.check_size()
        expected = 1 if flow.cfg is None else 2
        with flow.prepared():
            calls = self.recorder(expected, **flow.arguments_of_call(prompt, steps))
        first, negative = calls[0], None
        if len(flow.state_of(first)) > 1:  # both prompts in one batch
            negative, first = halves(first)
            if flow.prompt_first:
                negative, first = first, negative
        elif len(calls) > 1 and at_one_time(*(c[flow.time_argument] for c in calls)):
            negative = calls[1]
        elif flow.cfg is not None:
            raise ValueError(
                f"{type(self.pipe).__name__} called its denoiser without a negative prompt at "
                f"{flow.cfg_argument} {flow.cfg:g}: this model takes no classifier-free guidance, "
                "so leave cfg out"
            )
        self._prompts.setdefault(prompt)
        kept, state = flow.kept(first), flow.state_of(first)
        there = dtypes_of(kept)
        likely = [d for d in (dtype_of(flow.network), state.dtype, *there) if d in there]
        found = Condition(
            kept, None if negative is None else flow.kept(negative), tuple(state.shape[1:]),
            next(iter(likely), dtype_of(flow.network)),
        )  # fmt: skip
        return found, flow.grid()


def at_one_time(a: Any, b: Any) -> bool:
    """Return whether two calls, for the prompt and the negative prompt, belong to one step."""
    return torch.equal(torch.as_tensor(a), torch.as_tensor(b))


def _offloads(module: nn.Module) -> bool:
    """Return whether a module's weights are offloaded by hooks of accelerate or diffusers."""
    hook = getattr(module, "_hf_hook", None)
    kinds = {type(h).__name__ for h in [hook, *getattr(hook, "hooks", ())]}
    if kinds & {"CpuOffload", "UserCpuOffloadHook"} or getattr(hook, "offload", False):
        return True
    registry = getattr(module, "_diffusers_hook", None)
    return "group_offloading" in getattr(registry, "hooks", {})
