"""`steer.sample`: guided sampling in one call, by the name of a method."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from steer.flow import FlowMap, flat_prompts
from steer.guidance.ascent import Sampler
from steer.guidance.kernel import Jump
from steer.guidance.population import Population, Stop
from steer.guidance.potential import Evaluation, Potential
from steer.guidance.resampler import ess
from steer.guidance.smc import Guidance
from steer.noise import Noise
from steer.path import Time
from steer.reward import Reward, score, wrap
from steer.sampling.calibrate import learn
from steer.sampling.counts import Counted, CountedReward, Counts
from steer.sampling.methods import (
    TABLE,
    affordable,
    check_options,
    method_options,
    step_times,
)
from steer.sampling.result import Result

__all__ = ["PROBES", "check", "sample"]

PROBES = 32

"""How many one-jump samples a prompt's temperature is set by."""

_TRACES = {"trace_ess": "ess", "trace_log_z": "log_z", "trace_reward": "reward"}


def sample(
    flow: FlowMap,
    reward: Reward | Callable[..., Tensor],
    prompts: Sequence[str] | str | None = None,
    particles: int = 8,
    steps: int = 16,
    method: str = "fmtt",
    temperature: float | None = None,
    strength: float | None = None,
    seed: int = 0,
    *,
    reward_prompts: Sequence[str] | str | None = None,
    init_image: Tensor | None = None,
    init_time: float | None = None,
    target: float | None = None,
    budget: float | None = None,
    batch_size: int | None = None,
    position: int = 0,
    callback: Callable[[Population], None] | None = None,
    **options: Any,
) -> Result:
    """Sample `q(x) ∝ p(x) exp(reward(x) / temperature)`, theory (15), by a named method.

    Args:
        flow: the flow map, no prompts bound.
        reward: a Reward, or any callable on images (n, 3, h, w) and, if it wants them, prompts.
        prompts: a list (a leading prompt axis everywhere), one string, or None.
        particles: n, for each prompt.
        steps: steps from noise to data.
        method: one of `METHODS`.
        temperature: in the reward's units; lower steers harder.
        strength: instead: the temperature is, for each prompt, the reward's standard deviation
            over 32 one-jump samples divided by this. Default: 3.
        seed: keys all randomness.
        reward_prompts: what the reward is asked, where that differs from the prompts.
        init_image: start from a picture in [0, 1], (3, h, w), or one for each prompt,
            (p, 3, h, w), with the noise of `init_time`.
        init_time: where such a start is: 0 is pure noise, near 1 little changes. Default: .5.
        target: stop a prompt as soon as its best particle is seen at this reward; one jump to
            t = 1 ends the run, its weight included. A step after which the method does not look
            (`fmrg-j` outside its window) ends nothing.
        budget: stop in the same way so that a particle costs at most this many NFE; setting the
            temperature is not counted.
        batch_size: the most rows in one network call. Default: all for a flow without
            parameters, else 64. It never changes the noise.
        position: the place of the first prompt in a longer list, of which this call does a part.
        callback: called with the population after each step (of each batch of prompts).
        **options: the method's own, see `method_options`.

    Raises:
        ValueError: an unknown method or option, an empty list, numbers below one, temperature
            and strength both, a reward without spread, of a wrong shape, or without the gradient
            that the method needs; a picture that does not fit the model.
        FloatingPointError: a reward that is not finite: names prompt, particle and step.
    """
    reward = wrap(reward)
    check(
        flow, reward, prompts, particles, steps, method, temperature, strength, seed,
        reward_prompts=reward_prompts, init_image=init_image, init_time=init_time, target=target,
        budget=budget, batch_size=batch_size, **options,
    )  # fmt: skip
    if prompts is None:
        names: list[str] | None = None
    else:
        names = [prompts] if isinstance(prompts, str) else list(prompts)
    p = 1 if names is None else len(names)
    asked = _asked(reward_prompts, names)
    some = next(iter(flow.parameters()), None)
    if batch_size is None:
        batch_size = 64 if some is not None else p * particles
    given = None
    if init_image is not None:
        given = _encoded(flow, init_image, p), 0.5 if init_time is None else float(init_time)
    most_steps = None
    if budget is not None:
        most_steps = affordable(
            method, steps, budget / flow.evaluations, reward.differentiable,
            0.0 if given is None else given[1], **options,
        )  # fmt: skip
    learnt = learn(flow, reward, names, asked, seed)
    run = _Sampling(
        flow, reward, particles, steps, method, temperature, strength or 3.0, seed, batch_size,
        callback, options, given, target, most_steps,
    )  # fmt: skip
    group = max(1, batch_size // particles) if target is None else 1  # each ends by itself
    start = time.perf_counter()
    parts = []
    for a in range(0, p, group):
        chosen = range(a, min(a + group, p))
        parts.append(
            run(
                None if names is None else [names[i] for i in chosen],
                None if asked is None else [asked[i] for i in chosen],
                range(position + a, position + chosen.stop),
                a,
            )
        )
    joined = {
        key: joined_trace([part[key] for part in parts])
        if key in _TRACES
        else torch.cat([part[key] for part in parts])
        for key in parts[0]
    }
    if prompts is None or isinstance(prompts, str):
        joined = {key: v[:, 0] if key in _TRACES else v[0] for key, v in joined.items()}
    rows = p * particles
    return Result(
        x=joined["x"],
        images=joined.get("images"),
        rewards=joined["rewards"],
        log_w=joined["log_w"],
        log_z=joined.get("log_z"),
        ess=joined["ess"],
        nfe=(run.counts.forward + run.counts.backward) / rows,
        temperature=joined.get("temperature"),
        best=joined["rewards"].argmax(-1),
        prompts=prompts,
        method=method,
        seed=seed,
        reward_prompts=reward_prompts,
        costs={
            "network_gradients": run.counts.backward / rows,
            "reward_calls": run.counts.reward / rows,
            "reward_gradients": run.counts.reward_gradient / rows,
            "temperature_nfe_per_prompt": run.probe_counts.forward / p,
            "temperature_reward_calls_per_prompt": run.probe_counts.reward / p,
            "seconds": time.perf_counter() - start,
        }
        | ({"learning_nfe": learnt * flow.evaluations} if learnt else {}),
        trace={name: joined[key] for key, name in _TRACES.items()},
    )


def joined_trace(parts: list[Tensor]) -> Tensor:
    """Join traces (steps, p) of batches of prompts; those that stopped early keep their last."""
    steps = max(map(len, parts))
    return torch.cat([torch.cat([t, t[-1:].expand(steps - len(t), -1)]) for t in parts], 1)


def _encoded(flow: FlowMap, image: Tensor, prompts: int) -> Tensor:
    """Return the x of one picture, or of one for each prompt, (1 or p, *event)."""
    images = image[None] if image.ndim == 3 else image
    if not images.is_floating_point() or float(images.min()) < 0 or float(images.max()) > 1:
        raise ValueError(
            f"an init image of {images.dtype} from {float(images.min()):g} to "
            f"{float(images.max()):g}: pictures are floats in [0, 1], so divide bytes by 255"
        )
    if len(images) not in {1, prompts}:
        raise ValueError(f"{len(images)} init images for {prompts} prompts: give one, or one each")
    some = next(iter(flow.parameters()), None)
    x = flow.encode(images if some is None else images.to(some.device))
    if tuple(x.shape[1:]) != tuple(flow.event_shape):
        raise ValueError(
            f"an init image of shape {tuple(images.shape[1:])}, which the model takes for x of "
            f"shape {tuple(x.shape[1:])}: it wants {tuple(flow.event_shape)}, so resize the image"
        )
    return x


def check(
    flow: FlowMap,
    reward: Reward,
    prompts: Sequence[str] | str | None = None,
    particles: int = 8,
    steps: int = 16,
    method: str = "fmtt",
    temperature: float | None = None,
    strength: float | None = None,
    seed: int = 0,
    *,
    reward_prompts: Sequence[str] | str | None = None,
    init_image: Tensor | None = None,
    init_time: float | None = None,
    target: float | None = None,
    budget: float | None = None,
    batch_size: int | None = None,
    **options: Any,
) -> None:
    """Fail at the door: raise the ValueErrors that `sample` documents, before any work."""
    check_options(method, options)
    known = method_options(method)
    if prompts is not None and len(prompts) == 0:
        raise ValueError("the list of prompts is empty: give at least one, or None for no prompt")
    size = 1 if batch_size is None else batch_size
    counts = {"particles": particles, "steps": steps, "batch_size": size}
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if temperature is not None and strength is not None:
        raise ValueError(
            "temperature and strength both given: strength sets the temperature from the reward's "
            "spread, so give one of them"
        )
    for name, number in (("temperature", temperature), ("strength", strength)):
        if number is not None and not (number > 0 and math.isfinite(number)):
            raise ValueError(f"{name} must be a number above zero, got {number}")
    chosen = TABLE[method]
    if init_image is None and init_time is not None:
        raise ValueError("init_time says where a start from a picture is: give init_image as well")
    if init_time is not None and not 0 <= init_time < 1:
        raise ValueError(f"init_time must be in [0, 1) (0 noise, 1 data), got {init_time}")
    if init_image is not None and chosen.from_noise:
        others = ", ".join(name for name, m in TABLE.items() if not m.from_noise)
        raise ValueError(
            f"method {method!r} begins with pure noise and cannot start from a picture: take one "
            f"of {others}"
        )
    if target is not None and chosen.build is None:
        raise ValueError(
            f"method {method!r} looks at no reward on the way, so it cannot stop at a target: "
            "take a method that steers"
        )
    if target is not None and not math.isfinite(target):
        raise ValueError(f"target must be a finite reward, got {target}")
    if chosen.build is not None and not chosen.tempered and (temperature or strength):
        tempered = ", ".join(name for name, m in TABLE.items() if m.tempered)
        raise ValueError(
            f"method {method!r} has no temperature: it climbs as far as its own options say "
            f"({', '.join(known)}); leave temperature and strength out, or take one of {tempered}"
        )
    if chosen.gradient and not reward.differentiable:
        free = [name for name, m in TABLE.items() if not m.gradient]
        raise ValueError(
            f"method {method!r} needs the reward's gradient, and the reward is declared not "
            f"differentiable: take one of {', '.join(free)}, or a differentiable reward"
        )
    asked = _asked(reward_prompts, [prompts] if isinstance(prompts, str) else prompts)
    start = 0.0 if init_image is None else 0.5 if init_time is None else init_time
    if chosen.build is not None:  # its parts check their numbers
        chosen.build(flow, reward, asked, 1.0, step_times(steps, start), **options)
    if budget is not None:
        affordable(
            method, steps, budget / flow.evaluations, reward.differentiable, start, **options
        )


def _asked(
    reward_prompts: Sequence[str] | str | None, names: Sequence[str] | None
) -> list[str] | None:
    """Return what the reward is asked, one per prompt."""
    p = 1 if names is None else len(names)
    if reward_prompts is None:
        return None if names is None else list(names)
    asked = [reward_prompts] * p if isinstance(reward_prompts, str) else list(reward_prompts)
    if len(asked) != p:
        raise ValueError(f"{len(asked)} reward_prompts for {p} prompts: give one for each, or one")
    return asked


class _Sampling:
    """One call's settings; called once for each batch of prompts."""

    def __init__(
        self,
        flow: FlowMap,
        reward: Reward,
        particles: int,
        steps: int,
        method: str,
        temperature: float | None,
        strength: float,
        seed: int,
        batch_size: int,
        callback: Callable[[Population], None] | None,
        options: Mapping[str, Any],
        given: tuple[Tensor, float] | None,
        target: float | None,
        most_steps: int | None,
    ) -> None:
        self.given, self.target, self.most_steps = given, target, most_steps
        self.flow, self.particles, self.method = flow, particles, method
        self.temperature, self.strength, self.seed = temperature, strength, seed
        self.batch_size, self.callback, self.options = batch_size, callback, options
        self.counts, self.probe_counts = Counts(), Counts()
        self.plain_reward = reward
        self.reward = CountedReward(reward, self.counts)
        self.times = step_times(steps, 0.0 if given is None else given[1])
        some = next(iter(flow.parameters()), None)
        self.device = torch.device("cpu") if some is None else some.device
        self.dtype = torch.get_default_dtype()

    def __call__(
        self, names: list[str] | None, asked: list[str] | None, positions: range, first: int
    ) -> dict[str, Tensor]:
        bound = self.flow if names is None else self.flow.given(names)
        flow = Counted(bound, self.counts)
        method = TABLE[self.method]
        build = method.build
        start = self._start(positions, first, self.particles, "start")
        temperature: Tensor | None = None
        guide: Sampler
        if build is None:
            guide = Guidance(_Unseen(), Jump(flow), times=self.times)
        else:
            if method.tempered:
                temperature = self._temperature(bound, asked, positions, first)
            guide = build(flow, self.reward, asked, temperature, self.times, **self.options)
        guide.batch_size = self.batch_size
        history = []
        stop = self._stop()
        for population in guide.steps(start, self.seed, position=positions.start, stop=stop):
            last = population
            history.append((last.ess, last.log_z, last.reward.mean(-1)))
            if self.callback is not None:
                self.callback(population)
        trace_ess, trace_log_z, trace_reward = (torch.stack(h) for h in zip(*history, strict=True))
        with torch.no_grad():
            rows = last.x.flatten(0, 1)
            images = self._decode(flow, rows)
            rewards = last.reward
            if build is None:
                scores = self._score(images, asked, self.reward, positions)
                rewards = scores.reshape(last.log_w.shape)
        out = {
            "x": last.x,
            "rewards": rewards,
            "log_w": last.log_w,
            "ess": ess(last.log_w),
            "trace_ess": trace_ess,
            "trace_log_z": trace_log_z,
            "trace_reward": trace_reward,
        }
        if images.ndim == 4 and images.shape[1] == 3:
            out["images"] = images.unflatten(0, last.x.shape[:2])
        if temperature is not None:
            out |= {"log_z": last.log_z, "temperature": temperature}
        return out

    def _stop(self) -> Stop | None:
        """Return what says, after a step, whether target or budget end the run."""
        if self.target is None and self.most_steps is None:
            return None
        steps = 0

        def stop(population: Population) -> bool:
            nonlocal steps
            steps += 1
            if self.target is not None and bool((population.reward.amax(-1) >= self.target).all()):
                return True
            return self.most_steps is not None and steps >= self.most_steps

        return stop

    def _start(self, positions: range, first: int, particles: int, step: str) -> Tensor:
        """Draw the start, (p, particles, *event): noise, or a picture with noise."""
        noise = Noise(
            self.seed, positions, particles, step=step, device=self.device, dtype=self.dtype
        )
        drawn = noise.normal(self.flow.event_shape).unflatten(0, (len(positions), particles))
        if self.given is None:
            return drawn
        x, time = self.given
        x = x if len(x) == 1 else x[first : first + len(positions)]
        alpha, beta = self.flow.path(time)
        return alpha.to(drawn) * drawn + beta.to(drawn) * x.to(drawn)[:, None]

    def _decode(self, flow: FlowMap, rows: Tensor) -> Tensor:
        return torch.cat([flow.decode(part) for part in rows.split(self.batch_size)])

    def _score(
        self, images: Tensor, asked: list[str] | None, reward: Reward, positions: range
    ) -> Tensor:
        prompts = None if asked is None else flat_prompts(asked, len(images))
        scores = []
        for a in range(0, len(images), self.batch_size):
            b = a + self.batch_size
            scores.append(score(reward, images[a:b], None if prompts is None else prompts[a:b]))
        rewards = torch.cat(scores).float().to(images.device)
        bad = (~torch.isfinite(rewards)).nonzero()
        if len(bad):
            row, n = int(bad[0]), len(images) // len(positions)
            name = f" ({asked[row // n]!r})" if asked else ""
            raise FloatingPointError(
                f"the reward is {float(rewards[row])} for prompt {positions[row // n]}{name}, "
                f"particle {row % n}, at the last step (t = 1): a reward must be finite for every "
                "picture; guard its logarithms and divisions"
            )
        return rewards

    @torch.no_grad()
    def _temperature(
        self, bound: FlowMap, asked: list[str] | None, positions: range, first: int
    ) -> Tensor:
        """Return one temperature a prompt, (p,): as given, else theory (16)."""
        p = len(positions)
        if self.temperature is not None:
            return torch.full((p,), self.temperature, device=self.device)
        flow = Counted(bound, self.probe_counts)
        start = self._start(positions, first, PROBES, "temperature")
        size = max(1, self.batch_size // p)
        jumped = torch.cat(
            [
                flow.lookahead(start[:, a : a + size].flatten(0, 1), self.times[0]).unflatten(
                    0, (p, -1)
                )
                for a in range(0, PROBES, size)
            ],
            1,
        ).flatten(0, 1)
        images = self._decode(flow, jumped)
        counted = CountedReward(self.plain_reward, self.probe_counts)
        rewards = self._score(images, asked, counted, positions)
        spread = rewards.reshape(p, PROBES).std(1)
        largest = rewards.reshape(p, PROBES).abs().amax(1)
        flat = (spread <= 1e-6 * largest).nonzero().flatten().tolist()
        if flat:
            name = f" ({asked[flat[0]]!r})" if asked else ""
            raise ValueError(
                f"the reward has no spread over {PROBES} one-jump samples of prompt "
                f"{positions[flat[0]]}{name}, so no temperature can be set from it: give "
                "temperature=..., or a reward that tells these samples apart"
            )
        return spread / self.strength


class _Unseen(Potential):
    """No reward."""

    def evaluate(self, x: Tensor, t: Time, derivatives: bool = False) -> Evaluation:
        zero = torch.zeros(len(x), device=x.device)
        return Evaluation(zero, zero + torch.nan)
