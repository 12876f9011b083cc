"""The table of sampling methods: how each is built."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import Any

from torch import Tensor

from steer.catalogue import METHODS
from steer.flow import FlowMap
from steer.guidance.ascent import Sampler
from steer.guidance.kernel import Kernel
from steer.guidance.potential import Denoised, Lookahead, Naive
from steer.guidance.smc import Guidance
from steer.names import unknown
from steer.reward import Reward
from steer.sampling import builders, published

__all__ = [
    "METHODS",
    "TABLE",
    "AnyMethod",
    "Method",
    "check_options",
    "default_method",
    "method_of",
    "method_options",
]

WHOLE = (0.0, 1.0)


@dataclass(frozen=True)
class Method:
    """How a method is built, and what it needs.

    Attributes:
        build: (flow, reward, prompts, temperature, times, *, options) -> a sampler.
        gradient: whether it needs the reward's gradient.
        tempered: whether it samples the tilt at a temperature, with weights and log Z.
        from_noise: whether it begins with pure noise, and cannot start from a picture.
        steers: whether it evaluates the reward before the end.
        weighs: whether its particles have weights, and log Z; None: if it is tempered.
        jumps: whether it uses only jumps, never the velocity; None: if it is not tempered.
        law: what it samples, in a few words.
        source: works to cite, keys of `steer.sampling.citations.CITATIONS`.
        name: its usual name.
        more: further options that `build` takes, with their defaults.
    """

    build: Callable[..., Sampler]
    gradient: bool = False
    tempered: bool = True
    from_noise: bool = False
    marginal: bool = False
    steers: bool = True
    weighs: bool | None = None
    jumps: bool | None = None
    law: str = "none: it maximises the reward"
    source: tuple[str, ...] = ()
    name: str = ""
    more: Mapping[str, Any] = field(default_factory=dict)

    @property
    def weighted(self) -> bool:
        """Whether its particles have weights, and log Z."""
        return self.tempered if self.weighs is None else self.weighs

    @property
    def asks_velocity(self) -> bool:
        """Whether it uses the flow's velocity."""
        return self.tempered if self.jumps is None else not self.jumps

    @property
    def options(self) -> dict[str, Any]:
        """Its options with their defaults."""
        settled = getattr(self.build, "keywords", {})
        return {
            p.name: p.default
            for p in inspect.signature(self.build).parameters.values()
            if p.kind is p.KEYWORD_ONLY and p.name not in settled
        } | dict(self.more)


AnyMethod = str | Method | Callable[..., Any]
"""A method by its name, as an entry of the table, or a user's own: see `method_of`."""


_NEUTRAL: Mapping[str, Any] = {
    "view": "denoiser", "rho": 1.0, "mu": 0.0, "inner": 1, "recur": 1, "smooth": 0.0, "draws": 1,
    "normalise": False, "damp": None, "early": False, "cap": 1.0,
}  # fmt: skip
"""Neutral values of TFG's parameters for methods of its family."""


def _kin(
    own: Mapping[str, Any], fixed: Mapping[str, Any], source: tuple[str, ...], **flags: Any
) -> Method:
    """Return a method of the TFG family: `own` parameters are its options, others are fixed."""
    build = partial(published.training_free, **{**_NEUTRAL, **fixed, **own})
    flags = {"gradient": True, "weighs": False, **flags}
    return Method(build, source=source, more=own, **flags)


_SEARCH: dict[str, Any] = {"tempered": False}
_EXACT = "tilt"

TABLE: Mapping[str, Method] = MappingProxyType(
    {
        "none": Method(builders.unguided, tempered=False, steers=False, law="the model's"),
        "best-of-n": Method(builders.unguided, tempered=False, steers=False),
        "fmtt": Method(
            partial(builders.fmtt, Lookahead), gradient=True, law="tilt, biased by the step",
            marginal=True, source=("fmtt",),
        ),
        "denoiser": Method(
            partial(builders.fmtt, Denoised, lookahead=1), gradient=True,
            law="tilt, biased by the step", marginal=True, source=("fmtt",),
        ),
        "naive": Method(
            partial(builders.fmtt, Naive, lookahead=1), gradient=True,
            law="tilt, biased by the step", marginal=True, source=("fmtt",),
        ),
        "split": Method(builders.split, law=_EXACT, marginal=True),
        "fmrg-j": Method(builders.fmrg_j, gradient=True, tempered=False, source=("fmrg",)),
        "reno": Method(
            builders.reno, gradient=True, tempered=False, from_noise=True, source=("reno",)
        ),
        "noise-smc": Method(
            published.noise_smc, from_noise=True, jumps=True, law="tilt of the map's own samples",
            source=("pcn", "slice", "adaptive-smc"),
        ),
        "renoise": Method(published.renoise, jumps=True, law=_EXACT),
        "posterior": Method(published.posterior, law=_EXACT, source=("mfm", "diamond")),
        "tds": Method(published.tds, gradient=True, law=_EXACT, source=("tds",)),
        "das": Method(published.das, jumps=True, law=_EXACT, source=("das",)),
        "fk": Method(
            partial(published.fk, kind="max"), jumps=True, law="tilt, degenerate if strong",
            source=("fk",),
        ),
        "fk-difference": Method(
            partial(published.fk, kind="difference"), jumps=True, law=_EXACT, source=("fk",)
        ),
        "fk-sum": Method(
            partial(published.fk, kind="sum"), jumps=True, law="tilt, degenerate if strong",
            source=("fk",),
        ),
        "svdd": Method(
            partial(published.search, pick="softmax", width=None), weighs=False, jumps=True,
            source=("svdd",),
        ),
        "beam": Method(partial(published.search, pick="best"), source=("fmtt",), **_SEARCH),
        "tree": Method(
            partial(published.search, pick="own", width=None), source=("fmtt",), **_SEARCH
        ),
        "rounds": Method(
            partial(published.search, pick="best", width=1, candidates=1, churn=1.0, noise=None),
            source=("fmtt",), **_SEARCH,
        ),
        "dno": Method(
            published.dno, gradient=True, tempered=False, from_noise=True,
            source=("dno", "d-flow"),
        ),
        "fmrg-e": _kin(
            {"mu": 0.3, "inner": 5},
            {"view": "lookahead", "rho": 0.0, "normalise": True, "early": True}, ("fmrg",),
            tempered=False, jumps=True,
        ),
        "dps": _kin({"rho": 1.0, "normalise": False, "cap": 1.0}, {}, ("dps",)),
        "damped": _kin(
            {"rho": 1.0, "damp": 1.0, "cap": 1.0}, {"view": "denoiser"}, ("damped",)
        ),
        "lgd-mc": _kin({"rho": 1.0, "smooth": 0.3, "draws": 4, "cap": 1.0}, {}, ("lgd",)),
        "freedom": _kin({"rho": 1.0, "recur": 2, "cap": 1.0}, {}, ("freedom",)),
        "ugd": _kin(
            {"rho": 1.0, "mu": 0.1, "inner": 1, "recur": 2, "cap": 1.0}, {}, ("ugd",)
        ),
        "mpgd": _kin({"mu": 0.1, "inner": 1}, {"rho": 0.0}, ("mpgd",)),
        "tfg": Method(published.training_free, gradient=True, weighs=False, source=("tfg",)),
    }
)  # fmt: skip
"""Name -> how it is built; `steer.METHODS` has a line for each."""


def method_of(method: AnyMethod) -> Method:
    """Return a method: a method of the table by its name, or your own.

    Your own method is

    - a kernel, a class of `steer.Kernel` whose arguments but the flow have defaults: it is run
      with the lookahead and ratio weights, and its arguments, `scale` and `threshold` are its
      options;
    - a builder, `build(flow, reward, prompts, temperature, times, *, options) -> sampler`: a
      function, or the sampler's class. It may have attributes of `Method`: `gradient`, `tempered`,
      `from_noise`, `steers`.

    Raises:
        ValueError: no such method (the message has the nearest names), or an object that cannot be
            called in this way.
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
            f"method {name!r} is not a kernel and cannot be called with (flow, reward, prompts, "
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
    """Build guidance with a user's kernel, exact because of its ratio weights, theory (23)."""
    view = Lookahead(flow, reward, prompts, temperature)
    made = kernel(flow, **options)  # type: ignore[call-arg]
    return Guidance(view, made, times=times, scale=scale, threshold=threshold)


def default_method(differentiable: bool, tilted: bool = False) -> str:
    """Return the default method.

    Args:
        differentiable: whether the reward has a gradient, and the model passes it on.
        tilted: whether a temperature or a strength was given, which asks for an exact method.

    >>> default_method(True), default_method(False), default_method(True, tilted=True)
    ('fmrg-j', 'best-of-n', 'renoise')
    """
    if tilted:
        return "renoise"
    return "fmrg-j" if differentiable else "best-of-n"


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
    {'moves': 1, 'threshold': 0.5, 'lookahead': 1, 'least': None}

    Raises:
        ValueError: no such method; the message has the nearest names.
    """
    return method_of(method).options
