"""Guided sampling as sequential Monte Carlo: potential, kernel, weights, resampler.

Each step proposes, weights, resamples where the effective sample size has fallen, and moves. With
`Ratio` weights, theory (23), `E[exp(log_z)] = Z = E_p[exp(reward / temperature)]` for the kernel's
own law p, theory (37).
"""

import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from steer.guidance.kernel import Adaptation, Kernel, Sde
from steer.guidance.population import Population, Stop, check_times, lead_shape, not_finite
from steer.guidance.potential import Denoised, Lookahead, Naive, Potential
from steer.guidance.resampler import Resampler, ess, log_mean_exp, systematic
from steer.guidance.state import SharedFlow, SharedPotential
from steer.guidance.weights import Continuous, Ratio, Step, Weights
from steer.noise import Noise

__all__ = ["Guidance"]


class Guidance:
    """Sample `rho_t e^{r_t}` from times[0] to times[-1] with weighted particles.

    Args:
        potential: how the reward is seen.
        kernel: the transition.
        weights: the rule for the increments. Default: `Ratio()`.
        resampler: who survives.
        times: increasing, in [0, 1]; r at times[0] counts as 0. Default: 0 to 1 in 16 steps.
        scale: how far the gradient shifts the proposal: 0 not at all, 1 the published drift, 2 no
            first-order variance of the ratio weights. It never changes the law that is sampled.
        threshold: resample a prompt when ESS / n is below it, or a tuple of times at which to.
        batch_size: the most rows in one network call, but never less than one of each prompt;
            None: all at once.

    Raises:
        ValueError: parts that do not fit, each with the mend.
    """

    def __init__(
        self,
        potential: Potential,
        kernel: Kernel,
        weights: Weights | None = None,
        resampler: Resampler = systematic,
        times: Sequence[float] | Tensor | None = None,
        scale: float = 0.0,
        threshold: float | Sequence[float] = 0.5,
        *,
        batch_size: int | None = None,
    ) -> None:
        self.potential, self.kernel = potential, kernel
        self.weights, self.resampler = weights or Ratio(), resampler
        grid = torch.linspace(0, 1, 17, dtype=torch.float64) if times is None else times
        self.times = [float(t) for t in grid]
        self.scale, self.batch_size = scale, batch_size
        self.threshold = tuple(threshold) if isinstance(threshold, Sequence) else threshold
        self._check()

    def _check(self) -> None:
        ts = self.times
        check_times(ts)
        if isinstance(self.threshold, tuple):
            strange = [t for t in self.threshold if all(abs(t - s) > 1e-9 for s in ts[1:-1])]
            if strange:
                raise ValueError(
                    f"cannot resample at {strange}: not among the times between the first and the "
                    f"last, {ts[1:-1]}"
                )
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        if self.scale != 0 and not self.potential.differentiable:
            raise ValueError(
                f"scale={self.scale} needs the reward's gradient, and the reward is declared not "
                "differentiable: take scale=0 with steer.Ratio(), or a differentiable reward"
            )
        if isinstance(self.weights, Continuous):
            if not isinstance(self.kernel, Sde) or self.kernel.clip is not None or self.scale != 1:
                raise ValueError(
                    "Continuous weights hold for the published drift alone: take "
                    "steer.Sde(flow) without clip and scale=1, or steer.Ratio()"
                )
            if not isinstance(self.potential, Lookahead | Denoised | Naive):
                raise ValueError(
                    "Continuous weights need the potential as published (Lookahead, Denoised or "
                    f"Naive, not wrapped), not {type(self.potential).__name__}: take steer.Ratio()"
                )

    def __call__(self, x0: Tensor, seed: int = 0, *, position: int = 0) -> Population:
        """Run to the end: see `steps`."""
        for population in self.steps(x0, seed, position=position):  # noqa: B007
            pass
        return population

    def steps(
        self, x0: Tensor, seed: int = 0, *, position: int = 0, stop: Stop | None = None
    ) -> Iterator[Population]:
        """Yield the population after each step.

        Args:
            x0: the start at times[0], (n, *event) or (p, n, *event).
            seed: keys all randomness of the run.
            position: the place of the first prompt in the caller's whole list.
            stop: asked after each step but the last; where it says so, one deterministic jump to
                the last time ends the run. Its weight is `r_1 - r_t`, exact for that jump.

        Raises:
            ValueError: a start of another shape, prompts that do not fit it.
            FloatingPointError: a reward, gradient or weight that is not finite; the message
                names prompt, particle and step.
        """
        run = _Run(self, x0, seed, position)
        for k in range(len(self.times) - 1):
            with torch.no_grad():  # not around the yield: the caller's grad mode is the caller's
                run.step(k)
                population = run.population()
            yield population
            if stop is not None and k + 2 < len(self.times) and stop(population):
                with torch.no_grad():
                    run.finish()
                    population = run.population()
                yield population
                return


class _Run:
    """The state of one run; rows are flat and prompt-major."""

    def __init__(self, guide: Guidance, x0: Tensor, seed: int, position: int) -> None:
        event = tuple(guide.kernel.flow.event_shape)
        lead = lead_shape(x0, event)
        self.guide, self.lead = guide, lead
        self.p, self.n = (1, lead[0]) if len(lead) == 1 else lead
        asked = guide.potential.prompts
        if asked is not None and len(asked) not in {1, self.p}:
            raise ValueError(
                f"the potential asks the reward about {len(asked)} prompts, the start has "
                f"{self.p}: give x0 as ({len(asked)}, n, *event)"
            )
        size = torch.as_tensor(guide.potential.temperature).numel()
        batch = guide.batch_size or self.p * self.n
        if size not in {1, self.p} and (size != self.p * self.n or batch < size):
            raise ValueError(
                f"the potential has {size} temperatures, the start {self.p} x {self.n} rows: give "
                "one, one per prompt, or one per row with batch_size=None"
            )
        if size not in {1, self.p} and guide.threshold != 0:
            raise ValueError(
                "one temperature per row, and resampling that would hand particles to other rows: "
                "give one per prompt, or threshold=0"
            )
        self.noise = Noise(
            seed,
            range(position, position + self.p),
            self.n,
            device=x0.device,
            dtype=torch.promote_types(x0.dtype, torch.float32),
        )
        self.k, self.time = 0, guide.times[0]
        self.flow = SharedFlow(guide.kernel.flow, self.p, guide.batch_size)
        self.kernel = copy.copy(guide.kernel)
        self.kernel.flow = self.flow
        wants = guide.scale != 0 or (
            guide.kernel.moves_by_gradient and guide.potential.differentiable
        )
        self.potential = SharedPotential(
            guide.potential, self.p, guide.batch_size, derivatives=wants, check=self._finite
        )
        self.adaptation = Adaptation()
        self.x = x0.detach().reshape(self.p * self.n, *event)
        self.log_w = torch.zeros(self.p, self.n, dtype=self.noise.dtype, device=x0.device)
        self.banked = self.log_w[:, 0].clone()

    def step(self, k: int) -> None:
        """Propose, weight, resample, move."""
        s, t = self.guide.times[k], self.guide.times[k + 1]
        self.k, noise = k, self.noise.at(k)
        x, log_ratio = self.kernel.propose(self.x, s, t, self.potential, self.guide.scale, noise)
        step = Step(self.x, s, x, t, log_ratio, self.potential, self.flow, first=k == 0)
        increment = self.guide.weights(step).to(self.log_w)
        self._finite("log-weight", increment)
        self.log_w = self.log_w + increment.reshape(self.p, self.n)
        self.x, self.time = x, t
        if k + 2 < len(self.guide.times):
            self._resample(noise)
        self.x = self.kernel.move(self.x, t, self.potential, noise, self.adaptation)

    def finish(self) -> None:
        """Jump to the last time at once.

        The weight is the ratio's, theory (23, 30), whatever the rule was.
        """
        last = self.guide.times[-1]
        x = self.flow.jump(self.x, self.time, last)
        increment = self.potential(x, last) - self.potential(self.x, self.time)
        self._finite("log-weight", increment)
        self.log_w = self.log_w + increment.to(self.log_w).reshape(self.p, self.n)
        self.x, self.time = x, last

    def _resample(self, noise: Noise) -> None:
        """Resample the prompts whose turn it is, theory (36), and bank their weight."""
        index = torch.arange(self.p * self.n, device=self.x.device).reshape(self.p, self.n)
        due = self._due()
        for i in due:
            self.banked[i] += log_mean_exp(self.log_w[i])
            index[i] = index[i][self.guide.resampler(self.log_w[i], noise.generator(i))]
            self.log_w[i] = 0
        if due:
            rows = index.flatten()
            known = self.potential.known(self.x, self.time)
            self.x = self.x[rows]
            if known is not None:
                self.potential.note(self.x, self.time, known.map(lambda v: v[rows]))

    def _due(self) -> list[int]:
        threshold = self.guide.threshold
        if isinstance(threshold, tuple):
            due = any(abs(self.time - t) <= 1e-9 for t in threshold)
            return list(range(self.p)) if due else []
        return (ess(self.log_w) / self.n < threshold).nonzero().flatten().tolist()

    def population(self) -> Population:
        """Return what the caller sees."""
        x, log_w = self.x, self.log_w
        reward = self.potential.evaluate(x, self.time).reward.reshape(self.p, self.n)
        log_z, size = self.banked + log_mean_exp(log_w), ess(log_w)
        if len(self.lead) == 1:
            return Population(x, self.time, log_w[0], log_z[0], reward[0], size[0])
        x = x.unflatten(0, (self.p, self.n))
        return Population(x, self.time, log_w, log_z, reward, size)

    def _finite(self, what: str, values: Tensor) -> None:
        """Raise for the first row that is not finite."""
        guide = self.guide
        where = f"step {self.k + 1} of {len(guide.times) - 1} (t = {guide.times[self.k + 1]:.3f})"
        first = self.noise.prompts[0]
        not_finite(what, values, self.n, first, guide.potential.prompts, where)
