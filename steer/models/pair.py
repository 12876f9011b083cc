"""Two models of one latent space as one flow: the velocity of one, the jumps of the other."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Self

from torch import Tensor, nn

from steer.doors import as_flow
from steer.flow import FlowMap
from steer.path import Time

__all__ = ["Pair"]


class Pair(FlowMap):
    """The velocity of a base model and the jumps of a student of it.

    A few-step student (SANA-Sprint, FLUX.1 schnell, an LCM-LoRA) jumps to clean pictures and has
    no velocity of its own; its teacher has one. So methods that need both, for instance `fmtt` and
    `split`, can use a pair. They are not exact for a pair: the jumps are the flow map of the
    base's velocity only up to the student's error.

    Decoder, encoder, times and re-noising are the student's, and adapters go on the student.

    Args:
        base: a flow or a diffusers pipeline, whose velocity, denoiser and score are used.
        jump: the student.

    Raises:
        ValueError: paths or states that differ; the message says which.
    """

    def __init__(self, base: FlowMap, jump: FlowMap) -> None:
        super().__init__()
        self.base, self.student = as_flow(base), as_flow(jump)
        self._take()
        if type(self.base.path) is not type(self.student.path):
            raise ValueError(
                f"the paths differ, {type(self.base.path).__name__} and "
                f"{type(self.student.path).__name__}: a pair needs one"
            )

    def _take(self) -> None:
        self.path, self.kind, self.churn = (
            self.student.path, self.student.kind, self.student.churn,
        )  # fmt: skip
        self.name, self.adapter_targets = self.student.name, self.student.adapter_targets
        self.component = self.student.component

    @property
    def event_shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """The shape of one x, the same for both.

        Raises:
            ValueError: it is not.
        """
        base, student = tuple(self.base.event_shape), tuple(self.student.event_shape)
        if base != student:
            raise ValueError(
                f"states of the base are {base}, those of the student {student}: a pair needs one "
                "latent space and one resolution, so give both the same height and width"
            )
        return student

    @property
    def denoiser(self) -> nn.Module:
        """The student's denoiser."""
        return self.student.denoiser

    @property
    def about(self) -> Mapping[str, Any]:
        """What files of adapters, which are for the student, store about it."""
        return self.student.about

    @property
    def lacks(self) -> dict[str, str]:
        """What either of them cannot do; a missing velocity of the student does not count."""
        student = {k: v for k, v in self.student.lacks.items() if k != "velocity"}
        return {**self.base.lacks, **student}

    def velocity(self, x: Tensor, t: Time) -> Tensor:
        """Return the base's velocity."""
        return self.base.velocity(x, t)

    def jump(self, x: Tensor, s: Time, t: Time) -> Tensor:
        """Return the student's jump."""
        return self.student.jump(x, s, t)

    def denoise(self, x: Tensor, t: Time) -> Tensor:
        """Return the base's denoiser."""
        return self.base.denoise(x, t)

    def score(self, x: Tensor, t: Time) -> Tensor:
        """Return the base's score."""
        return self.base.score(x, t)

    def derives(self, name: str) -> bool:
        """Return whether the base has no closed form."""
        return self.base.derives(name)

    def times(self, steps: int, start: float = 0.0) -> list[float]:
        """Return the student's times."""
        return self.student.times(steps, start)

    def along(self, times: Sequence[float]) -> Self:
        """Return the pair for a run on these times."""
        return self._with(self.base.along(times), self.student.along(times))

    def calls(self, name: str, *times: Time) -> int:
        """Return the number of network evaluations of a call, by the model that makes it."""
        return (self.student if name == "jump" else self.base).calls(name, *times)

    def given(self, prompts: Sequence[str]) -> Self:
        """Bind prompts to both."""
        return self._with(self.base.given(prompts), self.student.given(prompts))

    def _with(self, base: FlowMap, student: FlowMap) -> Self:
        if base is self.base and student is self.student:
            return self
        view = copy.copy(self)
        view._modules = dict(self._modules)
        view.base, view.student = base, student
        return view

    def decode(self, x: Tensor) -> Tensor:
        """Return the student's pictures."""
        return self.student.decode(x)

    def encode(self, images: Tensor) -> Tensor:
        """Return the student's states of pictures."""
        return self.student.encode(images)
