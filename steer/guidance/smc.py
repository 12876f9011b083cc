"""Guided sampling as sequential Monte Carlo: potential, kernel, weights, resampler.

Each step proposes, weights, resamples where the effective sample size has fallen, and moves. With
`Ratio` weights, theory (23), `E[exp(log_z)] = Z = E_p[exp(reward / temperature)]` for the kernel's
own law p, theory (37).
"""

import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from steer.batches import Batched
from steer.flow import log_dtype
from steer.guidance.checks import Checks
from steer.guidance.kernel import Adaptation, Jump, Kernel, Sde
from steer.guidance.population import NOTHING, Population, Rows, check_times
from steer.guidance.potential import Denoised, Lookahead, Naive, Potential
from steer.guidance.resampler import Resampler, ess, log_mean_exp, systematic
from steer.guidance.state import BatchedPotential, State
from steer.guidance.tempering import Tempered, next_inverse
from steer.guidance.weights import Continuous, Ratio, Step, Unweighted, Weights
from steer.noise import Noise
from steer.onto import onto
from steer.ranges import between, count, finite, within
from steer.reward import Rest, plain

__all__ = ["Guidance"]


class Guidance:
    """Sample `rho_t e^{r_t}` from times[0] to times[-1] with weighted particles.

    Args:
        potential: how the reward is evaluated.
        kernel: the transition.
        weights: the rule for the increments. Default: `Ratio()`.
        resampler: how particles are resampled.
        times: increasing, in [0, 1]; r at times[0] counts as 0. Default: 0 to 1 in 16 steps.
        scale: how far the gradient shifts the proposal: 0 is no shift, 1 the published drift, 2
            cancels the first-order variance of the ratio weights. It never changes the law that is
            sampled.
        threshold: resample a prompt when ESS / n is below it, in [0, 1]; or a tuple of times at
            which to resample.
        least: choose the ramp while running: at each step every prompt's g, from 0 to 1, is raised
            as far as its weights keep `ESS / n >= least`, that is a relative variance of at most
            `1 / least - 1`, and to 1 in the last step. Use it with kernels that keep the view of
            the potential, such as `Langevin`; with a kernel that re-noises, log Z gets worse,
            because g was chosen with particles that are then changed. The potential must have no
            ramp of its own (`ramp=torch.ones_like`), and the weights be `Ratio`. None: the
            potential's ramp.
        batch_size: maximum number of rows in one network call, but at least one of each prompt;
            None: all at once.

    Raises:
        ValueError: parts that do not fit each other; the message says how to fix it.
    """

    drop = False

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
        least: float | None = None,
        batch_size: int | None = None,
    ) -> None:
        self.potential, self.kernel = potential, kernel
        self.weights, self.resampler = weights or Ratio(), resampler
        grid = torch.linspace(0, 1, 17, dtype=torch.float64) if times is None else times
        self.times = [float(t) for t in grid]
        self.scale, self.batch_size, self.least = scale, batch_size, least
        self.threshold = tuple(threshold) if isinstance(threshold, Sequence) else threshold
        self._check()

    def _check(self) -> None:
        ts = self.times
        check_times(ts)
        finite("scale", self.scale)
        if not isinstance(self.threshold, tuple):
            within("threshold", self.threshold, 0.0, 1.0)
        else:
            strange = [t for t in self.threshold if not any(abs(t - s) <= 1e-9 for s in ts[1:-1])]
            if strange:
                raise ValueError(
                    f"cannot resample at {strange}: not among the times between the first and the "
                    f"last, {ts[1:-1]}"
                )
        if self.batch_size is not None:
            count("batch_size", self.batch_size)
        if self.least is not None:
            between("least", self.least, 0.0, 1.0)
            if not isinstance(self.weights, Ratio):
                raise ValueError("a ramp that is chosen while running needs steer.Ratio() weights")
        if self.scale != 0 and not self.potential.differentiable:
            raise ValueError(
                f"scale={self.scale} needs the reward's gradient, and the reward is declared not "
                "differentiable: take scale=0 with steer.Ratio(), or a differentiable reward"
            )
        if isinstance(self.weights, Continuous):
            if not isinstance(self.kernel, Sde) or self.kernel.clip is not None or self.scale != 1:
                raise ValueError(
                    "Continuous weights are valid only for the published drift: use "
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

    def steps(self, x0: Tensor, seed: int = 0, *, position: int = 0) -> Iterator[Population]:
        """Yield the population after each step.

        The caller may intervene: `population.keep` continues with some particles only, and
        `population.stop` ends the run with one deterministic jump to the last time, whose weight
        is `r_1 - r_t`, exact for that jump. `log_z` is then NaN, because the stop depends on the
        samples.

        Args:
            x0: the start at times[0], (n, *event) or (p, n, *event).
            seed: seed of all random numbers of the run.
            position: index of the first prompt in the caller's whole list.

        Raises:
            ValueError: a start of another shape, prompts that do not fit it.
            FloatingPointError: a reward, gradient or weight that is not finite; the message
                names prompt, particle and step.
        """
        asked = Rest(self.kernel.flow, *self.potential.asked)
        with plain(asked):
            run = _Run(self, x0, seed, position)
        while run.k < run.count:
            # not around the yield, so that the caller keeps its own state of torch
            with plain(asked), torch.no_grad():
                run.step()
                population = run.population()
            run.k += 1
            yield population
            if run.k < run.count:
                with plain(), torch.no_grad():
                    run.hear(population)


class _Run:
    """The state of one run; rows are flat and prompt-major."""

    def __init__(self, guide: Guidance, x0: Tensor, seed: int, position: int) -> None:
        flow, potential = guide.kernel.flow, guide.potential
        self.guide = guide
        self.rows = rows = Rows.of(x0, flow.event_shape, position, potential.prompts)
        size = torch.as_tensor(potential.temperature).numel()
        batch = guide.batch_size or rows.p * rows.n
        if size not in {1, rows.p} and (size != rows.p * rows.n or batch < size):
            raise ValueError(
                f"the potential has {size} temperatures, the start {rows.p} x {rows.n} rows: give "
                "one, one per prompt, or one per row with batch_size=None"
            )
        if size not in {1, rows.p} and guide.threshold != 0:
            raise ValueError(
                "one temperature per row, and resampling that would hand particles to other rows: "
                "give one per prompt, or threshold=0"
            )
        self.noise = Noise(
            seed,
            rows.positions,
            rows.n,
            device=x0.device,
            dtype=torch.promote_types(x0.dtype, torch.float32),
        )
        self.k, self.times = 0, list(guide.times)
        self.weighed: Tensor | None = None
        self.checks, self.read = Checks(rows), False
        self.ancestors = rows.starts().to(x0.device)
        eager = guide.scale != 0 or (guide.kernel.moves_by_gradient and potential.differentiable)
        self.state = State(
            rows.flat(x0),
            guide.times[0],
            Batched(flow, guide.batch_size, rows.p),
            BatchedPotential(potential, guide.batch_size, rows.p, self._finite, eager, guide.drop),
        )
        self.adaptation = Adaptation()
        self.log_w = torch.zeros(rows.p, rows.n, dtype=log_dtype(x0.device), device=x0.device)
        self.banked = self.log_w[:, 0].clone()
        # each run has its own copy
        self.weights, self.kernel = copy.copy(guide.weights), copy.copy(guide.kernel)
        self.tempered = (
            None if guide.least is None else Tempered(self.state.potential, rows.p, x0.device)
        )
        if self.tempered is not None:
            self.state.potential = self.tempered

    @property
    def count(self) -> int:
        """The number of steps of the run."""
        return len(self.times) - 1

    def step(self) -> None:
        """Propose, weight, resample, move."""
        here, t, noise = self.state, self.times[self.k + 1], self.noise.at(self.k)
        self.read, self.weighed = False, None
        self.kernel.flow, potential = here.views()
        scale = self.guide.scale
        x, log_ratio = self.kernel.propose(here.x, here.t, t, potential, scale, noise)
        there = here.at(x, t).learn_of(potential)
        if self.tempered is not None:
            self._raise(here, there, log_ratio)
        increment = self.weights(Step(here, there, log_ratio, first=self.k == 0))
        increment = increment.to(self.log_w)
        self._finite("log-weight", increment)
        self.log_w = self.log_w + increment.reshape(self.rows.p, self.rows.n)
        if self.guide.drop:  # for any rule of weights
            none = (there.value < NOTHING / 2).reshape(self.rows.p, self.rows.n)
            self.log_w = self.log_w.masked_fill(none, NOTHING)
        last = self.k + 1 == self.count
        self.state = there if last else self._resampled(there, noise)
        self.kernel.flow = self.state.views()[0]
        self.state = self.kernel.refresh(self.state, noise, self.adaptation)

    def _raise(self, here: State, there: State, log_ratio: Tensor) -> None:
        """Raise each prompt's g as far as the weights allow; to 1 in the last step."""
        assert self.tempered is not None
        p, n = self.rows.p, self.rows.n
        whole = self.tempered.whole(there.x, there.t).value.reshape(p, n)
        old = here.value if self.k else torch.zeros_like(here.value)
        now = self.tempered.g
        start = self.log_w + (log_ratio - old).reshape(p, n).to(self.log_w) + now[:, None] * whole
        last = self.k + 1 == self.count
        assert self.guide.least is not None
        found = next_inverse(start, whole, now, self.guide.least)
        self.tempered.g = torch.ones_like(now) if last else found

    def hear(self, population: Population) -> None:
        """Apply the caller's request for the yielded population."""
        wish = population.wish
        if wish.keep is not None:
            if torch.as_tensor(self.guide.potential.temperature).numel() > self.rows.p:
                raise ValueError(
                    "one temperature per row, and particles that are kept would take others' "
                    "rows: give one per prompt"
                )
            kept = onto(self.rows.kept(wish.keep), self.state.x.device)
            self.state, self.ancestors = self.state.rows(kept), self.ancestors[kept]
            self.weights.rows(kept)
            self.log_w = torch.zeros_like(self.log_w)
            self.banked = self.banked + torch.nan
        if wish.looked:
            self.banked = self.banked + torch.nan
        if wish.stop:  # one deterministic jump, weighted by its ratio, theory (23, 30)
            self.times = [*self.times[: self.k + 1], self.times[-1]]
            self.kernel = Jump(self.guide.kernel.flow)
            if isinstance(self.weights, Continuous):  # only for the published drift
                self.weights = Ratio()

    def _resampled(self, there: State, noise: Noise) -> State:
        """Resample the prompts that are due, theory (36), and add their mean weight to log Z."""
        p, n = self.rows.p, self.rows.n
        threshold = self.guide.threshold
        if isinstance(threshold, tuple) and not any(abs(there.t - t) <= 1e-9 for t in threshold):
            return there
        if threshold == 0 or isinstance(self.weights, Unweighted):
            return there  # weights are ignored, or equal
        log_w = self._read()
        self.weighed = ess(log_w)
        due = list(range(p))
        if not isinstance(threshold, tuple):
            due = (self.weighed / n < threshold).nonzero().flatten().tolist()
        if not due:
            return there
        index = torch.arange(p * n).reshape(p, n)
        for i in due:
            self.banked[i] += log_mean_exp(self.log_w[i])
            index[i] = index[i][self.guide.resampler(log_w[i], noise.generator(i))]
            self.log_w[i] = 0
        chosen = onto(index.flatten(), there.x.device)
        self.ancestors = self.ancestors[chosen]
        self.weights.rows(chosen)
        return there.rows(chosen)

    def _read(self) -> Tensor:
        """Check that all collected values are finite, and return the log-weights on the host."""
        (log_w,) = self.checks.read(self.log_w)
        self.read = True
        if self.guide.drop:
            self.rows.refuse_no_weight(log_w)
        return log_w

    def population(self) -> Population:
        """Return the population for the caller."""
        seen = self.state.evaluation()
        if not self.read:  # evaluations by later moves are checked in the next step
            self._read()
        log_z = self.banked + log_mean_exp(self.log_w)
        log_w = self.log_w.to(self.noise.dtype)
        return self.rows.population(
            self.state.x, self.state.t, seen.reward, seen.images, log_w, log_z, self.ancestors,
            seen.clean, self.weighed,
        )  # fmt: skip

    def _finite(self, what: str, values: Tensor) -> None:
        """Collect numbers to be checked when the step reads from the device."""
        where = f"step {self.k + 1} of {self.count} (t = {self.times[self.k + 1]:.3f})"
        self.checks.add(what, values, where)
