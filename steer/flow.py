"""The flow map: one object for velocity, denoiser, score and jump.

Along `x_t = alpha_t x_0 + beta_t x_1` the probability flow is `dx/dt = b_t(x)`, and the flow map
`X(s,t,x)` carries a point of it from time s to time t (Boffi et al. 2024, arXiv 2406.07507). It
satisfies theory (6, 7, 8) of docs/theory.md.
"""

import copy
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal, Self, final

import torch
from torch import Tensor, nn

from steer.path import Path, Time, as_time, like, step_times
from steer.rows import flat_prompts, log_dtype, per_row

__all__ = ["FlowMap", "Wrapped", "composed", "device_of", "flat_prompts", "log_dtype", "per_row"]


class FlowMap(nn.Module):
    """A flow map on events of shape `event_shape`.

    A subclass sets `path` and `event_shape` in its `__init__` and defines `velocity` and `jump`;
    optionally `given`, `decode`, `encode` and `log_prob`; and `denoiser` if it contains more
    modules than the one that velocity and jump call. Times are floats or tensors () or (n,).

    Attributes:
        path: the coefficients of the interpolation.
        event_shape: the shape of one x, without the batch axis.
        evaluations: network evaluations of one velocity or jump: 1, or 2 if it mixes two. A flow
            whose jumps need several overrides `calls`.
        kind: "two-time" for a map between any two times, "one-jump" for a student whose jumps all
            lead through its one-call picture, "velocity" for a velocity whose jumps integrate it.
        churn: how far its own sampler jumps beyond the next time before it re-noises, see
            `steer.Jump`.
        name: its name; adapters record it as their base.
        adapter_targets: ends of the names of the layers that get adapters by default; empty: every
            layer that can have them.
        posterior_map: its posterior map, `steer.PosteriorMap`, with prompts bound, if it has one.
        component: the name of this flow's denoiser in its diffusers pipeline, if it has one: its
            adapters are then also written for the pipeline's own loader.
    """

    path: Path
    event_shape: tuple[int, ...]
    evaluations: int = 1
    kind: Literal["two-time", "one-jump", "velocity"] = "two-time"
    churn: float = 0.0
    name: str = ""
    adapter_targets: tuple[str, ...] = ()
    component: str = ""
    posterior_map: Any = None

    @property
    def about(self) -> Mapping[str, Any]:
        """What a file of adapters stores about its base, in addition to the name: JSON."""
        return {}

    @property
    def lacks(self) -> Mapping[str, str]:
        """What this flow cannot do (for example "gradient") -> why, and how to change that.

        A method that needs it raises an error before it starts.
        """
        return {}

    @property
    def denoiser(self) -> nn.Module:
        """The module, within this flow, that velocity and jump call: adapters go nowhere else.

        Other modules (a decoder, a text encoder) never get adapters. Default: the submodule named
        `denoiser`, else the flow itself. If such a flow has its own `decode`, `encode` or `given`,
        one call of velocity and jump determines which of its submodules they use
        (`steer.adapters.targets`).
        """
        return self._modules.get("denoiser") or self

    @abstractmethod
    def velocity(self, x: Tensor, t: Time) -> Tensor:
        """Return `b_t(x) = E[x'_t | x_t = x]`, theory (3), (n, *event)."""

    @abstractmethod
    def jump(self, x: Tensor, s: Time, t: Time) -> Tensor:
        """Return `X(s,t,x)` for s <= t, theory (6), (n, *event)."""

    def mean_velocity(self, x: Tensor, s: Time, t: Time) -> Tensor:
        """Return `v(x,s,t) = (X(s,t,x) - x) / (t-s)`, theory (10), and `b_s(x)` for s = t.

        Default: from `jump` and `velocity`. A flow of a two-time network returns the network's.

        Args:
            x: points at s, (n, *event).
            s: start.
            t: end.
        """
        gap = as_time(t) - as_time(s)
        stay = gap == 0
        if bool(stay.all()):
            return self.velocity(x, s)
        v = (self.jump(x, s, t) - x) / like(torch.where(stay, 1.0, gap), x)
        if not bool(stay.any()):
            return v
        return torch.where(like(stay.to(x.dtype), x) == 1, self.velocity(x, s), v)

    @final
    def lookahead(self, x: Tensor, t: Time) -> Tensor:
        """Return `X(t,1,x)`, theory (9): the clean end of the flow from this state."""
        return self.jump(x, t, 1.0)

    def denoise(self, x: Tensor, t: Time) -> Tensor:
        """Return `D_t(x) = E[x_1 | x_t = x] = (alpha b - alpha' x) / (alpha beta' - alpha' beta)`.

        `D_1(x) = x`. See theory (4). Closed forms may override it; nothing else should.
        """
        time = as_time(t)
        end = time == 1
        asked = time.device.type == "cpu"  # elsewhere the host would wait
        if asked and bool(end.all()):
            return x
        time = torch.where(end, 0.5, time)  # rows at the end are replaced below
        d = self.path.denoised(x, self.velocity(x, time), time)
        if asked and not bool(end.any()):
            return d
        return torch.where(like(end.to(x.dtype), x) == 1, x, d)

    def score(self, x: Tensor, t: Time) -> Tensor:
        """Return `s_t(x) = -(x - beta D_t(x)) / alpha²`, theory (5): infinite at t = 1.

        Closed forms may override it; nothing else should.
        """
        return self.path.score(x, self.denoise(x, t), t)

    def times(self, steps: int, start: float = 0.0) -> list[float]:
        """Return the times of `steps` steps from `start` to 1: the model's own grid.

        Default: equidistant.
        """
        return step_times(steps, start)

    def along(self, times: Sequence[float]) -> "FlowMap":
        """Return this flow for a run on these times, if its own sampler depends on them.

        Default: itself.
        """
        return self

    def calls(self, name: str, *times: Time) -> int:
        """Return how many network evaluations a row of this call takes, for the NFE count.

        Args:
            name: velocity, jump, denoise or score.
            *times: the times of the call.
        """
        return self.evaluations

    def reuses(self, s: Time, t: Time) -> bool:
        """Return whether `X(s,t,x)` follows from the network's one prediction at (x, s).

        Then `X(s,t,x) = path.carried(x, D, s, t)` and `b_s(x) = path.velocity_of(x, D, s)` with
        `D = denoise(x, s)`, and `D = X(s,1,x)` if also `reuses(s, 1)`. A sampler that has
        evaluated the reward at (x, s) then makes its step without another network call. This is
        so for a velocity whose jump is one Euler step. Default: False, as for a two-time map.

        Args:
            s: start, a float or ().
            t: end, likewise.
        """
        return False

    def derives(self, name: str) -> bool:
        """Return whether `denoise`, `score` or `log_prob` has no closed form here."""
        return getattr(type(self), name) is getattr(FlowMap, name)

    def log_prob(self, x: Tensor, t: Time = 1.0) -> Tensor | None:
        """Return `log rho_t(x)`, (n,), or None if the model does not know it."""
        return None

    def given(self, prompts: Sequence[str]) -> "FlowMap":
        """Bind p prompts: the result takes p * n rows, prompt-major (row i: prompt i // n)."""
        return self

    def decode(self, x: Tensor) -> Tensor:
        """Return images (n, 3, h, w), nominally in [0, 1] and not clamped. Default: `x` itself."""
        return x

    def encode(self, images: Tensor) -> Tensor:
        """Return the x that decodes to these images (n, 3, h, w) in [0, 1].

        Default: the images themselves, as `decode` does by default.

        Raises:
            NotImplementedError: the flow has its own `decode`, but no inverse of it.
        """
        if type(self).decode is not FlowMap.decode:
            raise NotImplementedError(
                f"{type(self).__name__} cannot encode a picture: define encode(images), the "
                "inverse of its decode, to start from one"
            )
        return images


class Wrapped(FlowMap):
    """A wrapper around a flow: all calls go to the inner flow, each through `call`.

    A subclass overrides `call`, or the methods that it changes, and nothing else. Denoiser and
    score are computed from the wrapper's own velocity if the inner flow computes them from its
    velocity. `given` binds the prompts of the inner flow and wraps it again.

    Args:
        flow: the flow inside.
    """

    def __init__(self, flow: FlowMap) -> None:
        super().__init__()
        self._hold(flow)

    def _hold(self, flow: FlowMap) -> None:
        self.flow = flow
        self.path, self.evaluations = flow.path, flow.evaluations
        self.kind, self.churn, self.name = flow.kind, flow.churn, flow.name
        self.adapter_targets, self.component = flow.adapter_targets, flow.component

    @property
    def posterior_map(self) -> Any:
        """The posterior map of the inner flow."""
        return self.flow.posterior_map

    @property
    def event_shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """The shape of one x of the inner flow."""
        return self.flow.event_shape

    @property
    def about(self) -> Mapping[str, Any]:
        """What files of adapters store about the inner flow."""
        return self.flow.about

    @property
    def lacks(self) -> Mapping[str, str]:
        """What the inner flow cannot do."""
        return self.flow.lacks

    def times(self, steps: int, start: float = 0.0) -> list[float]:
        """Return the times of the inner flow."""
        return self.flow.times(steps, start)

    def calls(self, name: str, *times: Time) -> int:
        """Return the number of network evaluations of a call of the inner flow."""
        return self.flow.calls(name, *times)

    def reuses(self, s: Time, t: Time) -> bool:
        """Return what the flow inside says."""
        return self.flow.reuses(s, t)

    def along(self, times: Sequence[float]) -> Self:
        """Return this wrapper around the inner flow for a run on these times."""
        return self.around(self.flow.along(times))

    def around(self, flow: FlowMap) -> Self:
        """Return this wrapper around another flow; itself, if it already wraps that one."""
        if flow is self.flow:
            return self
        view = copy.copy(self)
        view._modules = dict(self._modules)
        view._hold(flow)
        return view

    @property
    def denoiser(self) -> nn.Module:
        """The denoiser of the inner flow."""
        return self.flow.denoiser

    def call(self, name: str, x: Tensor, *times: Time) -> Tensor:
        """Call velocity, jump, denoise or score of the inner flow, (n, *event)."""
        return getattr(self.flow, name)(x, *times)

    def velocity(self, x: Tensor, t: Time) -> Tensor:
        """Return the flow's velocity, (n, *event)."""
        return self.call("velocity", x, t)

    def jump(self, x: Tensor, s: Time, t: Time) -> Tensor:
        """Return the flow's jump, (n, *event)."""
        return self.call("jump", x, s, t)

    def mean_velocity(self, x: Tensor, s: Time, t: Time) -> Tensor:
        """Return the flow's mean velocity, (n, *event)."""
        return self.call("mean_velocity", x, s, t)

    def denoise(self, x: Tensor, t: Time) -> Tensor:
        """Return the flow's own denoiser if it has a closed form, else that of the velocity."""
        return super().denoise(x, t) if self.derives("denoise") else self.call("denoise", x, t)

    def score(self, x: Tensor, t: Time) -> Tensor:
        """Return the flow's own score if it has a closed form, else that of the denoiser."""
        return super().score(x, t) if self.derives("score") else self.call("score", x, t)

    def derives(self, name: str) -> bool:
        """Return whether the inner flow has no closed form."""
        return self.flow.derives(name)

    def log_prob(self, x: Tensor, t: Time = 1.0) -> Tensor | None:
        """Return the flow's log-density."""
        return self.flow.log_prob(x, t)

    def given(self, prompts: Sequence[str]) -> Self:
        """Bind prompts; returns itself if the flow takes none."""
        return self.around(self.flow.given(prompts))

    def decode(self, x: Tensor) -> Tensor:
        """Return the flow's images."""
        return self.flow.decode(x)

    def encode(self, images: Tensor) -> Tensor:
        """Return the states that decode to the images."""
        return self.flow.encode(images)


def composed(flow: FlowMap, x: Tensor, times: Sequence[Time]) -> Tensor:
    """Return x carried from times[0] to times[-1] by one jump from each time to the next."""
    for s, t in pairwise(times):
        x = flow.jump(x, s, t)
    return x


def device_of(flow: nn.Module) -> torch.device:
    """Return the device of a flow's parameters; the CPU for a flow without parameters."""
    some = next(iter(flow.parameters()), None)
    return torch.device("cpu") if some is None else some.device
