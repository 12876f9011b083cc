"""Exact sampling in the space of the noise: the tilt of a map's own samples."""

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from steer.batches import Batched
from steer.flow import FlowMap, composed, log_dtype, per_row
from steer.guidance.checks import Checks
from steer.guidance.population import Population, Rows
from steer.guidance.potential import Potential
from steer.guidance.resampler import Resampler, ess, log_mean_exp, systematic
from steer.guidance.state import BatchedPotential, State
from steer.guidance.tempering import BOUNDS, next_inverse
from steer.names import unknown
from steer.noise import Noise
from steer.onto import onto
from steer.path import like
from steer.ranges import between, count, within
from steer.reward import Rest, plain

__all__ = ["MOVES", "NoiseSMC", "elliptical", "langevin", "neal"]

MOVES = ("langevin", "pcn", "slice")
"""How noise is moved: with the gradient; without it; on an ellipse, without a step size."""

BEST = {"langevin": 0.57, "pcn": 0.3}
"""Target acceptance of the adapted step."""


def neal(x: Tensor, share: Tensor, z: Tensor) -> Tensor:
    """Return `sqrt(1-β²) x + β z`, which keeps N(0, I): preconditioned Crank-Nicolson.

    Accepted with probability `min(1, exp(g (R(y) - R(x))))` (Cotter et al. 2013, arXiv 1202.0709).

    Args:
        x: noise, (n, *event).
        share: β of each row, (n,), in (0, 1]; 1 is an independent proposal.
        z: standard normals, (n, *event).
    """
    return like((1 - share**2).sqrt(), x) * x + like(share, x) * z


def langevin(x: Tensor, share: Tensor, z: Tensor, slope: Tensor) -> Tensor:
    """Return `a x + (1-a) ∇(gR)(x) + β z`, `a = sqrt(1-β²)`: preconditioned Langevin.

    It is exact for N(0, I) for any β, so the step does not shrink with the dimension (Cotter et
    al. 2013, arXiv 1202.0709, their pCNL).

    Args:
        x: noise, (n, *event).
        share: β of each row, (n,), in (0, 1).
        z: standard normals, (n, *event).
        slope: `∇(gR)(x)`, (n, *event).
    """
    a = (1 - share**2).sqrt()
    return neal(x, share, z) + like(1 - a, x) * slope


def elliptical(x: Tensor, z: Tensor, angle: Tensor) -> Tensor:
    """Return `cos(θ) x + sin(θ) z`, a point of the ellipse through x and z."""
    return like(angle.cos(), x) * x + like(angle.sin(), x) * z


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Return the inner product of each row, in float64 where the device has it."""
    kind = log_dtype(a.device)
    return (a.to(kind) * b.to(kind)).flatten(1).sum(1)


class NoiseSMC:
    """Tempered SMC on `N(x_0; 0, I) exp(g R(G(x_0)))`, G the map in `jumps` jumps, g from 0 to 1.

    Exact for the tilt of G's own law, its push-forward of N(0, I), for any learned map: it needs
    neither velocity nor density. It is exact with classifier-free guidance too, whether that is
    distilled into the map or mixed at sampling, and with or without a gradient of the reward. An
    iteration raises each prompt's g as far as the weights allow (`next_inverse`), accumulates
    the weights, resamples where the ESS has fallen, and moves by kernels that leave `N exp(g R)`
    invariant, each with a Metropolis test. g reaches 1 after half of the iterations at the
    earliest, so that more iterations make log Z more precise. The moves:

    - "langevin": `langevin`, with the gradient through G;
    - "pcn": `neal`, without a gradient;
    - "slice": elliptical slice sampling (Murray, Adams, MacKay 2010, arXiv 1001.0175), where a row
      stays after `shrinks` proposals: still invariant, as the reverse move has the same brackets.

    A fraction of the rows, `fresh`, proposes an independent sample instead, which can change
    between modes that local moves do not connect. The step β is adapted for each prompt to the
    acceptance, .57 or .3. `exp(log_z)` estimates `Z = E exp(R(G(x_0)))`; choosing g by the same
    particles biases it by O(1/n). If g is below 1 at the last iteration it is set to 1 there, and
    the weights account for it.

    Args:
        flow: the map, prompts already bound.
        potential: the reward of x_0's picture over its temperature, evaluated at time 0, without a
            ramp; its own number of jumps must be `jumps`.
        iterations: number of iterations of weights, resampling and moves.
        jumps: jumps to the picture, on the model's own grid. They are composed without re-noising:
            for a student whose own sampler re-noises between its jumps this is a different law.
        moves: moves per iteration.
        move: one of `MOVES`.
        fresh: fraction of the rows that propose independently, in [0, 1].
        least: see `next_inverse`.
        bound: see `next_inverse`.
        threshold: resample a prompt when ESS / n is below it.
        shrinks: proposals per slice move, at least 1.
        resampler: how particles are resampled.
        batch_size: maximum number of rows in one network call; None: all at once.

    Raises:
        ValueError: an unknown move or bound, a number out of range, "langevin" for a reward
            without gradient.
    """

    drop = False

    def __init__(
        self,
        flow: FlowMap,
        potential: Potential,
        iterations: int,
        jumps: int = 1,
        moves: int = 1,
        move: Literal["langevin", "pcn", "slice"] = "langevin",
        fresh: float = 0.1,
        least: float = 0.5,
        bound: str = "ess",
        threshold: float = 0.7,
        shrinks: int = 3,
        resampler: Resampler = systematic,
        batch_size: int | None = None,
    ) -> None:
        if move not in MOVES:
            raise unknown("move", move, MOVES)
        if bound not in BOUNDS:
            raise unknown("bound", bound, BOUNDS)
        if move == "langevin" and not potential.differentiable:
            raise ValueError(
                'move="langevin" needs the reward\'s gradient, and the reward is declared not '
                'differentiable: take move="pcn" or move="slice"'
            )
        self.iterations, self.jumps = count("iterations", iterations), count("jumps", jumps)
        self.moves, self.shrinks = count("moves", moves), count("shrinks", shrinks)
        self.fresh, self.threshold = (
            within("fresh", fresh, 0, 1),
            within("threshold", threshold, 0, 1),
        )
        between("least", least, 0, 1)
        if bound == "ess" and threshold < least:
            raise ValueError(
                f"threshold={threshold:g} is below least={least:g}: g is raised until ESS / n is "
                "`least`, and would stay there, because nothing resamples; give a threshold of at "
                "least this"
            )
        self.flow, self.potential, self.batch_size = flow, potential, batch_size
        self.move, self.least, self.bound, self.resampler = move, least, bound, resampler

    def steps(self, x0: Tensor, seed: int = 0, *, position: int = 0) -> Iterator[Population]:
        """Yield the weighted noise (time 0) after each iteration, and in the end its pictures.

        `population.keep` continues with some particles, `population.stop` sets g = 1 at once.
        """
        asked = Rest(self.flow, *self.potential.asked)
        with plain(asked), torch.no_grad():
            run = _Run(self, x0, seed, position)
        for k in range(self.iterations):
            with plain(asked), torch.no_grad():
                run.iterate(k, last=k == self.iterations - 1)
                population = run.population()
            if k == self.iterations - 1:
                break
            yield population
            with plain(asked), torch.no_grad():
                run.hear(population)
                if population.wish.stop:
                    run.temper(torch.ones_like(run.g))
                    break
        with plain(asked), torch.no_grad():
            population = run.finish()
        yield population


class _Run:
    """The state of one run; rows are flat and prompt-major."""

    def __init__(self, smc: NoiseSMC, x0: Tensor, seed: int, position: int) -> None:
        self.smc, potential = smc, smc.potential
        self.rows = rows = Rows.of(x0, smc.flow.event_shape, position, potential.prompts)
        self.k, self.checks = 0, Checks(rows)
        self.weighed: Tensor | None = None
        self.flow = Batched(smc.flow, smc.batch_size, rows.p)
        eager = smc.move == "langevin"
        watched = BatchedPotential(potential, smc.batch_size, rows.p, self._finite, drop=smc.drop)
        self.here = State(rows.flat(x0), 0.0, self.flow, watched)
        self.here.evaluation(derivatives=eager)
        kind = log_dtype(x0.device)
        self.log_w = torch.zeros(rows.p, rows.n, dtype=kind, device=x0.device)
        self.banked = self.log_w[:, 0].clone()
        self.g = torch.zeros(rows.p, dtype=kind, device=x0.device)
        self.share = torch.full_like(self.g, 0.5)
        self.ancestors = rows.starts().to(x0.device)
        self.noise = Noise(
            seed, rows.positions, rows.n, device=x0.device,
            dtype=torch.promote_types(x0.dtype, torch.float32),
        )  # fmt: skip

    def iterate(self, k: int, last: bool) -> None:
        """Raise g, weigh, resample, move."""
        self.k = k
        noise = self.noise.at(k)
        r = self.here.value.reshape(self.rows.p, self.rows.n)
        found = next_inverse(self.log_w, r, self.g, self.smc.least, self.smc.bound)
        found = found.clamp(max=2 * (k + 1) / self.smc.iterations)
        self.temper(torch.ones_like(found) if last else found)
        self._resample(noise)
        for _ in range(self.smc.moves):
            self.here = (self._slice if self.smc.move == "slice" else self._propose)(noise)

    def temper(self, g: Tensor) -> None:
        """Weigh the particles for a higher g, (p,)."""
        self.weighed = None  # until the next resampling
        r = self.here.value.reshape(self.rows.p, self.rows.n)
        self.log_w = self.log_w + (g - self.g).to(r)[:, None] * r
        self.g = g

    def _resample(self, noise: Noise) -> None:
        p, n = self.rows.p, self.rows.n
        log_w = self._read()
        self.weighed = ess(log_w)
        due = (self.weighed / n < self.smc.threshold).nonzero().flatten().tolist()
        if not due:
            return
        index = torch.arange(p * n).reshape(p, n)
        for i in due:
            self.banked[i] += log_mean_exp(self.log_w[i])
            index[i] = index[i][self.smc.resampler(log_w[i], noise.generator(i))]
            self.log_w[i] = 0
        self._take(onto(index.flatten(), self.here.x.device))

    def _read(self) -> Tensor:
        """Check that all collected values are finite, and return the log-weights on the host."""
        (log_w,) = self.checks.read(self.log_w)
        if self.smc.drop:
            self.rows.refuse_no_weight(log_w)
        return log_w

    def _take(self, index: Tensor) -> None:
        self.here, self.ancestors = self.here.rows(index), self.ancestors[index]

    def _propose(self, noise: Noise) -> State:
        """Make a move of "langevin" or "pcn", some rows proposing independently."""
        x, eager = self.here.x, self.smc.move == "langevin"
        z = noise.normal(x.shape[1:]).to(x)
        g = per_row(self.g, len(x))
        fresh = noise.uniform() < self.smc.fresh
        share = per_row(self.share, len(x))
        y = neal(x, torch.where(fresh, 1.0, share), z)
        if eager:
            slope = like(g, x) * self._gradient(self.here)
            y = torch.where(_picks(fresh, x), y, langevin(x, share, z, slope))
        there = self.here.at(y, 0.0)
        there.evaluation(derivatives=eager)
        log_accept = g.to(self.here.value) * (there.value - self.here.value)
        if eager:
            back = like(g, x) * self._gradient(there)
            drift = _drift_ratio(x, y, slope, back, share)
            log_accept = log_accept + torch.where(fresh, 0.0, drift)
        accept = noise.uniform().to(log_accept).log() < log_accept
        rate = log_accept.clamp(max=0).exp().masked_fill(fresh, 0).reshape(self.rows.p, -1).sum(1)
        local = (~fresh).reshape(self.rows.p, -1).sum(1)
        gain = torch.where(local > 0, rate / local.clamp(min=1) - BEST[self.smc.move], 0.0)
        self.share = (self.share * (2 * gain.to(self.share)).exp()).clamp(1e-4, 0.999)
        return there.choose(accept, self.here)

    def _slice(self, noise: Noise) -> State:
        """Make an elliptical slice move: the bracket shrinks to x until a point is accepted."""
        x, here = self.here.x, self.here
        z = noise.normal(x.shape[1:]).to(x)
        g = per_row(self.g, len(x)).to(here.value)
        height = g * here.value + noise.uniform().to(here.value).log()
        angle = 2 * torch.pi * noise.uniform().to(x)
        low, high = angle - 2 * torch.pi, angle
        moved, open_ = here, torch.ones_like(angle, dtype=torch.bool)
        for k in range(self.smc.shrinks):
            there = here.at(elliptical(x, z, angle), 0.0)
            accept = open_ & (g * there.value > height)
            moved, open_ = there.choose(accept, moved), open_ & ~accept
            if k + 1 == self.smc.shrinks:
                break
            low, high = torch.where(angle < 0, angle, low), torch.where(angle < 0, high, angle)
            angle = torch.lerp(low, high, noise.uniform().to(x))
        return moved

    def _gradient(self, at: State) -> Tensor:
        gradient = at.evaluation(derivatives=True).gradient
        assert gradient is not None
        return gradient

    def hear(self, population: Population) -> None:
        """Apply the caller's request for the yielded population."""
        wish = population.wish
        if wish.keep is not None:
            self._take(onto(self.rows.kept(wish.keep), self.here.x.device))
            self.log_w = torch.zeros_like(self.log_w)
        if wish.keep is not None or wish.looked:
            self.banked = self.banked + torch.nan

    def finish(self) -> Population:
        """Return the pictures of the noise."""
        x = composed(self.flow, self.here.x, self.flow.times(self.smc.jumps))
        self.here = self.here.at(x, 1.0)
        return self.population()

    def population(self) -> Population:
        """Return the population for the caller."""
        seen = self.here.evaluation()
        if self.here.t == 1:
            self._read()
        log_z = self.banked + log_mean_exp(self.log_w)
        log_w = self.log_w.to(self.noise.dtype)
        return self.rows.population(
            self.here.x, self.here.t, seen.reward, seen.images, log_w, log_z, self.ancestors,
            weighed=self.weighed,
        )  # fmt: skip

    def _finite(self, what: str, values: Tensor) -> None:
        where = f"step {self.k + 1} of {self.smc.iterations}, in noise space"
        self.checks.add(what, values, where)


def _picks(where: Tensor, x: Tensor) -> Tensor:
    """Shape a mask (n,) so that it selects rows of x."""
    return where.reshape(-1, *[1] * (x.ndim - 1))


def _drift_ratio(x: Tensor, y: Tensor, slope: Tensor, back: Tensor, share: Tensor) -> Tensor:
    """Return the contribution of the drifts of `langevin` to the log acceptance, (n,).

    With `a = sqrt(1-β²)`, `c = 1-a`, and the drifts `c slope` at x and `c back` at y,
    `log N(y) q(x|y) - log N(x) q(y|x)` reduces to

        c/β² (<x - a y, back> - <y - a x, slope>) - c²/(2β²) (|back|² - |slope|²)
    """
    share = share.to(log_dtype(x.device))
    a = (1 - share**2).sqrt()
    c = 1 - a
    cross = _dot(x, back) - a * _dot(y, back) - _dot(y, slope) + a * _dot(x, slope)
    return c / share**2 * cross - c**2 / (2 * share**2) * (_dot(back, back) - _dot(slope, slope))
