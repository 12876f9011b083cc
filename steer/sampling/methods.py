"""The sampling methods by name: what each is built of, and what it costs."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

from torch import Tensor

from steer.flow import FlowMap
from steer.guidance.ascent import FlowMapControl, NoiseAscent, Sampler, whole_reward
from steer.guidance.control import controlled, guided_times, some_guided
from steer.guidance.kernel import Langevin, Sde
from steer.guidance.potential import Denoised, Lookahead, Naive, Potential
from steer.guidance.smc import Guidance
from steer.guidance.weights import Continuous, Ratio
from steer.names import unknown
from steer.reward import Reward

__all__ = [
    "METHODS",
    "TABLE",
    "Method",
    "affordable",
    "check_options",
    "method_options",
    "plan",
    "step_times",
]

WHOLE = (0.0, 1.0)


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
) -> Guidance:
    """Build FMTT's scheme, theory (20, 29) (2511.22688): Sde, Continuous weights.

    Ratio weights off its terms.
    """
    plain = view(flow, reward, prompts, temperature, lookahead)
    potential = controlled(
        plain, times, window=window, every=every, clip=clip, normalise=normalise
    )
    published = scale == 1 and potential is plain
    return Guidance(
        potential,
        Sde(flow, clip=None if published else 1.0, settle=settle),
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
    return FlowMapControl(flow, potential, times, scale, some_guided(times, window, every))


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


Times = Sequence[float]
Options = Mapping[str, Any]


@dataclass(frozen=True)
class Method:
    """A line for people, how to build it, and what it costs a particle.

    Attributes:
        line: what it does.
        build: (flow, reward, prompts, temperature, times, *, options) -> a sampler. None: as many
            composed jumps as there are steps, no guidance.
        cost: (times, gradients?, options) -> network calls, reward calls.
        gradient: whether it needs the reward's gradient.
        tempered: whether it samples the tilt at a temperature, with weights and log Z.
        from_noise: whether it begins with pure noise, and cannot start from a picture.
    """

    line: str
    build: Callable[..., Sampler] | None
    cost: Callable[[Times, bool, Options], tuple[int, int]]
    gradient: bool = False
    tempered: bool = True
    from_noise: bool = False


def _jumps_cost(times: Times, gradients: bool, options: Options) -> tuple[int, int]:
    """One jump a step; the reward at the end."""
    return len(times) - 1, 1


def _published_cost(
    times: Times,
    gradients: bool,
    options: Options,
    *,
    network: bool = True,
    transport: bool = False,
) -> tuple[int, int]:
    """A velocity a step; at its start a view, with its gradient where that shifts something.

    Args:
        times: of the run.
        gradients: whether the reward has some.
        options: the method's.
        network: whether the view is a network call.
        transport: whether the published weights want the velocity at each step: the last, a jump,
            asks for none of its own.
    """
    shifted = options["scale"] != 0
    guided = guided_times(times, options["window"], options["every"]) if shifted else []
    published = (
        options["scale"] == 1
        and guided == list(times[:-1])
        and options["clip"] is None
        and options["normalise"] is None
    )
    steps = len(times) - 1
    looks = steps - 1 + shifted  # r at the first time counts as 0: only the shift looks there
    views = looks + sum(t > 0 for t in guided)  # at t = 0 the ramp is 0: no gradient
    late = transport and published and options["settle"]
    return steps + late + network * options.get("lookahead", 1) * views, looks + 1


def _split_cost(times: Times, gradients: bool, options: Options) -> tuple[int, int]:
    """A jump and a look a step; a score, and for each move a look and two scores."""
    steps = len(times) - 1
    look, moves = (1 + gradients) * options["lookahead"], options["moves"]
    looks = (steps - 1) * (1 + moves)
    scores = (steps - 1) * (1 + 2 * moves) if moves else 0
    if not moves:
        look = options["lookahead"]
    return steps + looks * look + scores, looks + 1


def _control_cost(times: Times, gradients: bool, options: Options) -> tuple[int, int]:
    """A jump a step, and a look with its gradient at the start of the guided ones."""
    looks = len(guided_times(times, options["window"], options["every"]))
    return len(times) - 1 + 2 * looks * options["lookahead"], looks + 1


def _reno_cost(times: Times, gradients: bool, options: Options) -> tuple[int, int]:
    """A look and its gradient an iteration, the last without; the picture."""
    iterations, jumps = len(times) - 1, options["jumps"]
    return (2 * iterations - 1) * jumps + (
        jumps if options["finish"] is None else options["finish"]
    ), iterations + 1


TABLE: dict[str, Method] = {
    "none": Method("unguided: `steps` composed jumps", None, _jumps_cost, tempered=False),
    "best-of-n": Method(
        "unguided candidates by `steps` composed jumps, the best one wins",
        None,
        _jumps_cost,
        tempered=False,
    ),
    "fmtt": Method(
        "flow-map trajectory tilting as published: SDE drift by the lookahead's gradient, "
        "resampling on ESS (2511.22688)",
        partial(_published, Lookahead),
        _published_cost,
        gradient=True,
    ),
    "denoiser": Method(
        "the same, with the reward seen through the denoiser",
        partial(_published, Denoised, lookahead=1),
        partial(_published_cost, transport=True),
        gradient=True,
    ),
    "naive": Method(
        "the same, with the reward of the noisy state itself",
        partial(_published, Naive, lookahead=1),
        partial(_published_cost, network=False, transport=True),
        gradient=True,
    ),
    "split": Method(
        "exact: deterministic jump, ratio weight, resample, Metropolis-adjusted Langevin moves",
        _split,
        _split_cost,
    ),
    "fmrg-j": Method(
        "deterministic control: jumps pushed up the lookahead's normalised gradient (2604.27147)",
        _control,
        _control_cost,
        gradient=True,
        tempered=False,
    ),
    "reno": Method(
        "ascent in noise space: `steps` looks at the one-jump picture, the noise's norm kept "
        "(2406.04312)",
        _reno,
        _reno_cost,
        gradient=True,
        tempered=False,
        from_noise=True,
    ),
}
METHODS: Mapping[str, str] = MappingProxyType({name: m.line for name, m in TABLE.items()})
"""Name -> one line."""


def check_options(method: str, options: Iterable[str]) -> None:
    """Raise a ValueError for an unknown method, or an option that it does not take."""
    known = method_options(method)
    for name in options:
        if name not in known:
            takes = f"it takes {', '.join(known)}" if known else "it takes none"
            raise ValueError(f"method {method!r} takes no option {name!r}: {takes}")


def method_options(method: str) -> dict[str, Any]:
    """Return the options that a method takes, with their defaults.

    >>> method_options("split")
    {'moves': 1, 'threshold': 0.5, 'lookahead': 1}

    Raises:
        ValueError: no such method; the message has the nearest names.
    """
    if method not in TABLE:
        raise unknown("method", method, METHODS)
    build = TABLE[method].build
    parameters = inspect.signature(build).parameters.values() if build else ()
    settled = getattr(build, "keywords", {})
    return {
        p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in settled
    }


def step_times(steps: int, start: float = 0.0) -> list[float]:
    """Return `steps + 1` equidistant times from `start` to 1.

    >>> step_times(2)
    [0.0, 0.5, 1.0]
    """
    return [start + (1 - start) * k / steps for k in range(steps)] + [1.0]


def plan(
    method: str, steps: int, differentiable: bool = True, start: float = 0.0, **options: Any
) -> dict[str, int]:
    """Return what a method will cost a particle at most: network calls and reward calls.

    Network calls are NFE, theory (51), for a flow that evaluates its network once a call
    (`FlowMap.evaluations`).

    >>> plan("fmtt", 16)
    {'nfe': 47, 'reward_calls': 17}
    """
    known = method_options(method)
    calls, rewards = TABLE[method].cost(step_times(steps, start), differentiable, known | options)
    return {"nfe": calls, "reward_calls": rewards}


def affordable(
    method: str,
    steps: int,
    budget: float,
    differentiable: bool = True,
    start: float = 0.0,
    **options: Any,
) -> int | None:
    """Return after how many steps a run must end to cost at most `budget`; None: it costs less.

    A run that ends after k steps jumps to t = 1: it costs what those k times and 1 cost.

    >>> affordable("none", 16, 5), affordable("none", 4, 5)
    (4, None)

    Args:
        method: its name.
        steps: of the whole run.
        budget: network calls a particle.
        differentiable: whether the reward has gradients.
        start: where the run begins.
        **options: the method's own.

    Raises:
        ValueError: not even one step and the end fit; the message says what would.
    """
    chosen, times = TABLE[method], step_times(steps, start)
    settings = method_options(method) | options

    def cost(until: Times) -> int:
        return chosen.cost(until, differentiable, settings)[0]

    def spent(k: int) -> int:
        if chosen.from_noise:  # k looks, all with their gradient, and the picture
            return cost(times[: k + 1]) + settings["jumps"]
        return cost([*times[: k + 1], 1.0])

    if cost(times) <= budget:
        return None
    fitting = [k for k in range(1, steps) if spent(k) <= budget]
    if not fitting:
        least = min(spent(1), cost(times)) if steps > 1 else cost(times)
        raise ValueError(
            f"a budget of {budget:g} NFE a particle is too small: method {method!r} needs at "
            f"least {least} for its first step and the end"
        )
    return fitting[-1]
