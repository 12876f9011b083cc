"""The sampling methods by name: what each is built of."""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import Any

from torch import Tensor

from steer.catalogue import METHODS
from steer.flow import FlowMap
from steer.guidance.ascent import FlowMapControl, NoiseAscent, Sampler, whole_reward
from steer.guidance.control import Window, controlled
from steer.guidance.kernel import Jump, Kernel, Langevin, Sde
from steer.guidance.potential import Denoised, Lookahead, Naive, Potential, Terminal
from steer.guidance.smc import Guidance
from steer.guidance.weights import Continuous, Ratio, Unweighted
from steer.names import unknown
from steer.reward import Reward

__all__ = [
    "METHODS",
    "TABLE",
    "AnyMethod",
    "Method",
    "check_options",
    "method_of",
    "method_options",
]

WHOLE = (0.0, 1.0)


def _unguided(
    flow: FlowMap,
    reward: Reward,
    prompts: Sequence[str] | None,
    temperature: Tensor | float,
    times: Sequence[float],
    *,
    churn: float | None = None,
) -> Guidance:
    """Build composed jumps, whose reward is asked at the end.

    With churn they go past each time and re-noise back; None: as the model's own sampler does.
    """
    kernel = Jump(flow, flow.churn if churn is None else churn)
    view = Terminal(flow, reward, prompts)
    return Guidance(view, kernel, Unweighted(), times=times, threshold=0.0)


def _published(
    view: Callable[..., Potential],
    flow: FlowMap,
    reward: Reward,
    prompts: Sequence[str] | None,
    temperature: Tensor | float,
    times: Sequence[float],
    *,
    scale: float = 1.0,
    threshold: float | Sequence[float] = 0.5,
    settle: bool = True,
    lookahead: int = 1,
    window: Sequence[float] = WHOLE,
    every: int = 1,
    clip: float | None = None,
    normalise: float | None = None,
    noise: float = 1.0,
) -> Guidance:
    """Build FMTT's scheme, theory (20, 29) (2511.22688): Sde, Continuous weights.

    Ratio weights off its terms. `eps_t = noise (1 - t)`. The published weights are biased, of the
    order of the step: log Z is no evidence in few steps (docs/results.md).
    """
    if not 0 <= noise < math.inf:
        raise ValueError(
            f"noise must not be negative nor infinite, got {noise}: eps_t = noise (1 - t)"
        )
    plain = view(flow, reward, prompts, temperature, lookahead)
    potential = controlled(
        plain, times, window=Window.of(window, every), clip=clip, normalise=normalise
    )
    published = scale == 1 and potential is plain
    return Guidance(
        potential,
        Sde(flow, lambda t: noise * (1 - t), clip=None if published else 1.0, settle=settle),
        Continuous() if published else Ratio(),
        times=times,
        scale=scale,
        threshold=threshold,
    )


def _split(
    flow: FlowMap,
    reward: Reward,
    prompts: Sequence[str] | None,
    temperature: Tensor | float,
    times: Sequence[float],
    *,
    moves: int = 1,
    threshold: float | Sequence[float] = 0.5,
    lookahead: int = 1,
) -> Guidance:
    """Build the split scheme, theory (30): jump, ratio weight, resample, Langevin moves."""
    return Guidance(
        Lookahead(flow, reward, prompts, temperature, lookahead),
        Langevin(flow, moves=moves),
        Ratio(),
        times=times,
        threshold=threshold,
    )


def _control(
    flow: FlowMap,
    reward: Reward,
    prompts: Sequence[str] | None,
    temperature: Tensor | float,
    times: Sequence[float],
    *,
    scale: float = 0.3,
    brake: float | None = None,
    lookahead: int = 1,
    window: Sequence[float] = WHOLE,
    every: int = 1,
) -> FlowMapControl:
    """Build FMRG-J's control, theory (47)."""
    potential = controlled(whole_reward(flow, reward, prompts, lookahead), times, brake=brake)
    return FlowMapControl(flow, potential, times, scale, Window.of(window, every).times(times))


def _reno(
    flow: FlowMap,
    reward: Reward,
    prompts: Sequence[str] | None,
    temperature: Tensor | float,
    times: Sequence[float],
    *,
    rate: float = 0.15,
    brake: float | None = None,
    jumps: int = 1,
    finish: int | None = None,
) -> NoiseAscent:
    """Build ReNO's ascent, theory (49)."""
    potential = controlled(whole_reward(flow, reward, prompts, jumps), times, brake=brake)
    return NoiseAscent(flow, potential, len(times) - 1, rate, jumps, finish)


@dataclass(frozen=True)
class Method:
    """How a method is built, and what it needs.

    Attributes:
        build: (flow, reward, prompts, temperature, times, *, options) -> a sampler.
        gradient: whether it needs the reward's gradient.
        tempered: whether it samples the tilt at a temperature, with weights and log Z.
        from_noise: whether it begins with pure noise, and cannot start from a picture.
        steers: whether it looks at the reward before the end.
        name: what people call it.
        more: further options that `build` takes, with their defaults.
    """

    build: Callable[..., Sampler]
    gradient: bool = False
    tempered: bool = True
    from_noise: bool = False
    steers: bool = True
    name: str = ""
    more: Mapping[str, Any] = field(default_factory=dict)

    @property
    def options(self) -> dict[str, Any]:
        """The options that it takes, with their defaults."""
        settled = getattr(self.build, "keywords", {})
        return {
            p.name: p.default
            for p in inspect.signature(self.build).parameters.values()
            if p.kind is p.KEYWORD_ONLY and p.name not in settled
        } | dict(self.more)


AnyMethod = str | Method | Callable[..., Any]
"""A method by its name, as an entry of the table, or one of one's own: see `method_of`."""


TABLE: Mapping[str, Method] = MappingProxyType(
    {
        "none": Method(_unguided, tempered=False, steers=False),
        "best-of-n": Method(_unguided, tempered=False, steers=False),
        "fmtt": Method(partial(_published, Lookahead), gradient=True),
        "denoiser": Method(partial(_published, Denoised, lookahead=1), gradient=True),
        "naive": Method(partial(_published, Naive, lookahead=1), gradient=True),
        "split": Method(_split),
        "fmrg-j": Method(_control, gradient=True, tempered=False),
        "reno": Method(_reno, gradient=True, tempered=False, from_noise=True),
    }
)
"""Name -> how it is built; `steer.METHODS` has a line for each."""


def method_of(method: AnyMethod) -> Method:
    """Return a method: one of the table by its name, or one of one's own.

    One's own is

    - a kernel, a class of `steer.Kernel` whose arguments but the flow have defaults: it is run
      with the lookahead and ratio weights, and its arguments, `scale` and `threshold` are its
      options;
    - a builder, `build(flow, reward, prompts, temperature, times, *, options) -> sampler`: a
      function, or the sampler's class. What `Method` says of one it says as attributes:
      `gradient`, `tempered`, `from_noise`, `steers`.

    Raises:
        ValueError: no such method, with the nearest names; something that cannot be called so.
    """
    if isinstance(method, Method):
        return method
    if isinstance(method, str):
        if method not in TABLE:
            raise unknown("method", method, METHODS)
        return replace(TABLE[method], name=method)
    name = getattr(method, "__name__", type(method).__name__)
    if isinstance(method, type) and issubclass(method, Kernel):
        _, *rest = inspect.signature(method).parameters.values()
        if any(p.default is p.empty for p in rest):
            raise ValueError(
                f"kernel {name!r} needs more than a flow: give its other arguments defaults, or "
                "write a builder, build(flow, reward, prompts, temperature, times) -> sampler"
            )
        options = {p.name: p.default for p in rest}
        return Method(partial(_by_kernel, method), name=name, more=options)
    try:
        inspect.signature(method).bind(None, None, None, 1.0, WHOLE)
    except (TypeError, ValueError):
        raise ValueError(
            f"method {name!r} is no kernel and cannot be called with (flow, reward, prompts, "
            "temperature, times): write a class of steer.Kernel, or a builder that returns a "
            "sampler, its options after a *"
        ) from None
    said = ("gradient", "tempered", "from_noise", "steers")
    flags: dict[str, Any] = {k: bool(getattr(method, k)) for k in said if hasattr(method, k)}
    return Method(method, name=name, **flags)  # type: ignore[arg-type]


def _by_kernel(
    kernel: type[Kernel],
    flow: FlowMap,
    reward: Reward,
    prompts: Sequence[str] | None,
    temperature: Tensor | float,
    times: Sequence[float],
    *,
    scale: float = 0.0,
    threshold: float | Sequence[float] = 0.5,
    **options: Any,
) -> Guidance:
    """Build guidance by one's own kernel, exact by its ratio weights, theory (23)."""
    view = Lookahead(flow, reward, prompts, temperature)
    made = kernel(flow, **options)  # type: ignore[call-arg]
    return Guidance(view, made, times=times, scale=scale, threshold=threshold)


def check_options(method: AnyMethod, options: Iterable[str]) -> None:
    """Raise a ValueError for an unknown method, or an option that it does not take."""
    chosen = method_of(method)
    known = chosen.options
    for name in options:
        if name not in known:
            takes = f"it takes {', '.join(known)}" if known else "it takes none"
            raise ValueError(f"method {chosen.name!r} takes no option {name!r}: {takes}")


def method_options(method: AnyMethod) -> dict[str, Any]:
    """Return the options that a method takes, with their defaults.

    >>> method_options("split")
    {'moves': 1, 'threshold': 0.5, 'lookahead': 1}

    Raises:
        ValueError: no such method; the message has the nearest names.
    """
    return method_of(method).options
