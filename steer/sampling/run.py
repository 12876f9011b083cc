"""Run a request: populations step by step, and their result.

`steer.sample` is a single call; `steer.stream` does the same, but the caller has the loop.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from steer.batches import Ceiling
from steer.flow import FlowMap
from steer.guidance.population import Population
from steer.ranks import Ranks
from steer.reward import Rest, Reward, plain
from steer.sampling.calibrate import learn
from steer.sampling.counts import Counted, CountedReward, Counts
from steer.sampling.methods import AnyMethod
from steer.sampling.progress import shown
from steer.sampling.request import INVERSION, Request
from steer.sampling.result import TRACED, Part, Result, joined_trace
from steer.sampling.start import starts
from steer.sampling.temperature import temperatures

__all__ = ["Stream", "sample", "stream"]


class Stream(Iterator[Population]):
    """The populations of a request, one after each step, prompt group by prompt group.

    Each has its `positions` and its `nfe`, and a prompt axis where prompts were given as a list.
    Between two of them the caller may inspect the population, end the loop, or call
    `population.keep(...)` or `population.stop()`.

    Args:
        request: what to run.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.counts, self.probes = Counts(), Counts()
        self.learnt, self.seconds = 0, 0.0
        self.parts: list[dict[str, Tensor]] = []
        self._rest = Rest(request.flow, request.reward)
        self._ceiling = Ceiling.of_run()
        self._populations = self._run()

    def __next__(self) -> Population:
        """Make the next step."""
        begun = time.perf_counter()
        try:  # restore the caller's state between steps
            with plain(self._rest), self._ceiling.held():
                return next(self._populations)
        finally:
            self.seconds += time.perf_counter() - begun

    def _run(self) -> Iterator[Population]:
        request, counts = self.request, self.counts
        self.learnt = learn(
            request.flow, request.reward, request.names, request.asked, request.seed,
            batch_size=request.rows,
        )  # fmt: skip
        for group in request.groups:
            names, asked = (
                None if texts is None else texts[group.start : group.stop]
                for texts in (request.names, request.asked)
            )
            bound = request.flow if names is None else request.flow.given(names)
            bound = bound.along(request.grid)
            x0, probes = starts(request, group, bound)
            position, part = request.position + group.start, Part()
            drop = request.on_bad_reward == "drop"
            flow, reward = Counted(bound, counts), CountedReward(request.reward, counts, drop)
            probed = Counted(bound, self.probes), CountedReward(request.reward, self.probes)
            temperature = torch.full((len(group),), request.temperature or 1.0).to(x0.device)
            if probes is not None:
                temperature = temperatures(*probed, asked, probes, request, position)
            build, options = request.chosen.build, request.options
            sampler = build(flow, reward, asked, temperature, request.grid, **options)
            sampler.batch_size = request.rows
            if drop:
                sampler.drop = True  # type: ignore[attr-defined]
            before, rows = counts.nfe, len(group) * request.particles
            for population in sampler.steps(x0, request.seed, position=position):
                population = replace(population, nfe=float(counts.nfe - before) / rows)
                part.note(population)
                best = population.reward.amax(-1)
                if request.target is not None and bool((best >= request.target).all()):
                    population.stop()
                if len(part.history) == request.most_steps:
                    population.wish.stop = True  # known in advance, so it does not bias log Z
                yield population if request.listed else population.alone()
            self.parts.append(part.tensors(population, temperature))

    def collect(self) -> Result:
        """Make the remaining steps, and return the result."""
        for _ in self:
            pass
        done, groups = len(self.parts), len(self.request.groups)
        if done < groups:
            raise RuntimeError(
                f"this run ended after {done} of {groups} groups of prompts, by an error or an "
                "interruption: there is no result; sample again"
            )
        request, counts, probes = self.request, self.counts, self.probes
        joined = {
            key: (joined_trace if key.startswith("trace_") else torch.cat)(
                [part[key] for part in self.parts]
            )
            for key in self.parts[0]
        }
        ranks = Ranks.of_run()
        if ranks is not None:
            ranks.agree(joined["x"], joined["log_w"], joined["rewards"])
        if not request.listed:  # no prompt axis
            joined = {k: v[:, 0] if k.startswith("trace_") else v[0] for k, v in joined.items()}
        p, rows = request.count, request.count * request.particles
        one = request.flow.calls("jump", 0.0, 1.0)
        inverts = request.init_by == "inversion"
        inverting = 2.0 * INVERSION * request.flow.calls("velocity", request.start)
        # a stop that depends on the population is a selection, so the estimate of Z is not valid
        tempered = request.chosen.tempered
        evidence = (
            request.chosen.weighted
            and request.target is None
            and not (request.init_image is not None and request.chosen.marginal)
            and not joined["log_z"].isnan().all()
        )
        return Result(
            x=joined["x"],
            images=joined.get("images"),
            ancestors=joined.get("ancestors"),
            rewards=joined["rewards"],
            log_w=joined["log_w"],
            log_z=joined["log_z"] if evidence else None,
            ess=joined["ess"],
            nfe=float(counts.nfe) / rows,
            temperature=joined["temperature"] if tempered else None,
            best=joined["rewards"].argmax(-1),
            prompts=request.prompts,
            method=request.chosen.name,
            seed=request.seed,
            reward_prompts=request.reward_prompts,
            costs={
                "network_gradients": float(counts.backward) / rows,
                "reward_calls": float(counts.reward) / rows,
                "reward_gradients": float(counts.reward_gradient) / rows,
                "temperature_nfe_per_prompt": float(probes.forward) / p,
                "temperature_reward_calls_per_prompt": float(probes.reward) / p,
                "seconds": self.seconds,
            }
            | ({"learning_nfe": self.learnt * one} if self.learnt else {})
            | ({"bad_rewards": counts.all_bad} if request.on_bad_reward == "drop" else {})
            | ({"inversion_nfe_per_prompt": inverting} if inverts else {}),
            trace={name: joined[f"trace_{name}"] for name in TRACED},
        )


def stream(
    flow: FlowMap,
    reward: Reward | Callable[..., Tensor],
    prompts: Sequence[str] | str | None = None,
    *positional: Any,
    **arguments: Any,
) -> Stream:
    """Sample step by step: the arguments are those of `steer.sample`, without its callback.

    Yields a population after each step, for one group of prompts after the other (as many prompts
    as fit in `batch_size` rows). `collect()` makes the remaining steps and returns the result.

    Raises:
        ValueError: as `steer.sample`, at once.
    """
    taken = list(Request.__dataclass_fields__)
    arguments |= dict(zip(taken[3:9], positional, strict=False))
    options = {k: v for k, v in arguments.items() if k not in taken or k == "options"}
    known = {k: v for k, v in arguments.items() if k not in options}
    return Stream(Request(flow, reward, prompts, **known, options=options))  # type: ignore[arg-type]


def sample(
    flow: FlowMap,
    reward: Reward | Callable[..., Tensor],
    prompts: Sequence[str] | str | None = None,
    particles: int = 8,
    steps: int = 16,
    method: AnyMethod | None = None,
    temperature: float | None = None,
    strength: float | None = None,
    seed: int = 0,
    *,
    reward_prompts: Sequence[str] | str | None = None,
    init_image: Tensor | None = None,
    init_time: float | None = None,
    init_by: Literal["noise", "inversion"] = "noise",
    on_bad_reward: Literal["stop", "drop"] = "stop",
    target: float | None = None,
    budget: float | None = None,
    batch_size: int | None = None,
    position: int = 0,
    times: Sequence[float] | None = None,
    callback: Callable[[Population], None] | None = None,
    progress: bool | None = None,
    **options: Any,
) -> Result:
    """Sample `q(x) ∝ p(x) exp(reward(x) / temperature)`, theory (15), by a named method.

    Args:
        flow: the flow map, no prompts bound.
        reward: a Reward, or any callable on images (n, 3, h, w) and, optionally, prompts.
        prompts: a list (a leading prompt axis everywhere), one string, or None.
        particles: n, for each prompt.
        steps: steps from noise to data, at the model's own times (`flow.times`).
        method: one of `METHODS`, or your own kernel or builder: see `methods.method_of`. Default:
            fmrg-j (gradient ascent); best-of-n if the reward has no gradient; renoise (exact) if a
            temperature or a strength is given.
        temperature: what the reward is divided by, in its units; lower means stronger guidance.
        strength: instead of a temperature: for each prompt the temperature is the reward's
            standard deviation over 32 one-jump samples divided by this. Default: 3.
        seed: seed of all random numbers.
        reward_prompts: prompts for the reward, if they differ from the model's prompts.
        init_image: start from a picture in [0, 1], (3, h, w), or one for each prompt,
            (p, 3, h, w), with the noise of `init_time`.
        init_time: time of such a start: 0 is pure noise, near 1 little changes. Default: .5.
        init_by: "noise" adds the noise of that time to the picture. "inversion" goes back along
            the flow's ODE, so that an unguided run reproduces the picture (for edits). All
            particles then start at the same point, so several particles need a stochastic method.
            It costs 32 velocities per prompt.
        on_bad_reward: "stop" raises an error if a reward is not finite. "drop" gives its particle
            weight zero, and counts it in `costs["bad_rewards"]`. `split` and `noise-smc` then
            sample the tilt restricted to samples with a finite reward; methods that re-noise also
            lose particles whose reward would have become finite later. Searches and ascents do not
            move such a particle, and never return it.
        target: stop a prompt as soon as the lookahead of its best particle has this reward; one
            jump to t = 1 ends the run. Such a stop depends on the samples, so there is no log Z. A
            step without an evaluation of the reward (`fmrg-j` outside its window) never stops the
            run.
        budget: stop in the same way so that a particle costs at most this many NFE; setting the
            temperature is not counted. This stop does not depend on the samples, so log Z is still
            valid.
        batch_size: maximum number of rows in one network call. Default: all for a flow without
            parameters, else 64. It never changes the noise.
        position: the index of the first prompt in a longer list, if this call does a part of it.
        times: the times of the run, increasing from its start to 1, instead of `steps`.
        callback: called with the population after each step (of each group of prompts).
        progress: whether to show the progress. Default: a bar in a terminal or a notebook, after
            the first seconds of the run, and nothing elsewhere.
        **options: options of the method, see `steer.methods.method_options`.

    Raises:
        ValueError: an unknown method or option, an empty list, numbers below one, both temperature
            and strength, a reward with standard deviation zero, of a wrong shape, or without the
            gradient that the method needs; a picture that does not fit the model.
        FloatingPointError: a reward that is not finite; the message names prompt, particle and
            step.
    """
    populations = Stream(
        Request(
            flow, reward, prompts, particles, steps, method, temperature, strength, seed,  # type: ignore[arg-type]
            reward_prompts, init_image, init_time, init_by, on_bad_reward, target, budget,
            batch_size, position,
            times, options,
        )
    )  # fmt: skip
    request = populations.request
    total = len(request.groups) * (len(request.grid) - 1)
    for population in shown(populations, total, request.chosen.name, progress):
        if callback is not None:
            callback(population)
    return populations.collect()
