"""Search: more candidates than particles, of which the best are kept. No log Z, no gradient."""

import copy
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from steer.guidance.ascent import Ascent
from steer.guidance.kernel import Kernel
from steer.guidance.population import Population, check_times
from steer.guidance.potential import Potential
from steer.guidance.state import State
from steer.names import unknown
from steer.noise import Noise
from steer.ranges import count
from steer.reward import Rest, plain

__all__ = ["PICKS", "Search"]

PICKS = ("softmax", "own", "best")
"""What is kept: one of a particle's candidates, sampled; the best of them; the best of all."""


class Search:
    """Each particle proposes candidates by a kernel; the reward of their views selects.

    - "softmax": each particle continues with one of its own candidates, sampled by `softmax(R)`:
      SVDD (Li et al. 2024, arXiv 2408.08252).
    - "own": each particle continues with the best of its own candidates: tree search with one
      branch per particle.
    - "best": the best of all candidates of a prompt are kept: beam search with copies (Sabour et
      al. 2025, 2511.22688, appendix). With `Jump(churn=1)`, one candidate and width 1 it is
      best-of-n in rounds: clean samples, of which the best is re-noised. It collapses to few
      modes.

    Args:
        kernel: the proposal; it must be stochastic, or all candidates of a particle are equal.
        potential: the reward over its temperature as evaluated at t, without a ramp.
        times: increasing, in [0, 1].
        candidates: candidates per particle.
        pick: one of `PICKS`.
        width: with "best", how many are kept, each copied until there are n again; in the last two
            steps, which make the returned samples, n are kept. Default: always n.
        batch_size: maximum number of rows in one network call; None: all at once.

    Raises:
        ValueError: an unknown pick, times that do not increase, no candidate.
    """

    drop = False

    def __init__(
        self,
        kernel: Kernel,
        potential: Potential,
        times: Sequence[float],
        candidates: int = 4,
        pick: Literal["softmax", "own", "best"] = "softmax",
        width: int | None = None,
        batch_size: int | None = None,
    ) -> None:
        check_times(times)
        if pick not in PICKS:
            raise unknown("pick", pick, PICKS)
        self.kernel, self.potential, self.batch_size = kernel, potential, batch_size
        self.times, self.pick = list(times), pick
        self.candidates = count("candidates", candidates)
        self.width = None if width is None else count("width", width)

    def steps(self, x0: Tensor, seed: int = 0, *, position: int = 0) -> Iterator[Population]:
        """Yield the population after each step; its reward is that of the views that were chosen.

        `population.keep` and `population.stop` as in `Guidance.steps`.
        """
        times, flow = list(self.times), self.kernel.flow
        asked = Rest(flow, *self.potential.asked)
        with plain():
            run = Ascent(
                flow, self.potential, self.batch_size, x0, position, len(times) - 1, self.drop
            )
        noise = Noise(
            seed, run.rows.positions, run.rows.n, device=x0.device,
            dtype=torch.promote_types(x0.dtype, torch.float32),
        )  # fmt: skip
        here, stopped = run.at(run.x0, times[0]), False
        kernel = copy.copy(self.kernel)
        kernel.flow = run.flow
        while run.k + 1 < len(times):
            t = times[run.k + 1]
            with plain(asked), torch.no_grad():
                if stopped:
                    here = run.at(here.jump(t), t)
                else:
                    # the last but one step is followed by a jump, so all n are kept
                    width = self.width if run.k + 2 < run.count else None
                    here = self._step(run, kernel, here, t, noise.at(run.k), width)
                seen = here.evaluation()
                population = run.population(here.x, t, seen.reward, seen.images, seen.clean)
            run.k += 1
            yield population
            with plain(), torch.no_grad():
                kept = run.kept(population)
                here = here if kept is None else here.rows(kept)
            if population.wish.stop and t < self.times[-1]:
                times, stopped = [*times[: run.k + 1], self.times[-1]], True

    def _step(
        self, run: Ascent, kernel: Kernel, here: State, t: float, noise: Noise, width: int | None
    ) -> State:
        """Return the kept rows at t, with the values that are known for them."""
        found = []
        kernel.flow, potential = here.views()  # all candidates share a jump
        # a step to t = 1 adds no noise, so all candidates would be equal
        for _ in range(self.candidates if t < 1 else 1):
            y, _ratio = kernel.propose(here.x, here.t, t, potential, 0.0, noise)
            found.append(run.at(y, t))
        if len(found) == 1 and (self.pick != "best" or width is None):
            return found[0]
        p, n, m = run.rows.p, run.rows.n, len(found)
        value = torch.stack([f.value for f in found])  # (m, p n)
        if self.pick == "softmax":
            gumbel = -torch.log(-torch.stack([noise.uniform() for _ in found]).log())
            chosen = (value + gumbel.to(value)).argmax(0)
        elif self.pick == "own":
            chosen = value.argmax(0)
        if self.pick != "best":
            best = found[0]
            for i, state in enumerate(found[1:], 1):
                best = state.choose(chosen == i, best)
            return best
        whole = value.reshape(m, p, n).transpose(0, 1).reshape(p, m * n)
        top = whole.topk(min(width or n, m * n), dim=1).indices  # places in (m, n)
        top = top[:, torch.arange(n, device=top.device) % top.shape[1]]
        rows = top % n + n * torch.arange(p, device=top.device)[:, None]
        run.ancestors = run.ancestors[rows.flatten()]
        which = (top // n).flatten()
        parts = [state.rows(rows.flatten()) for state in found]
        best = parts[0]
        for i, state in enumerate(parts[1:], 1):
            best = state.choose(which == i, best)
        return best
