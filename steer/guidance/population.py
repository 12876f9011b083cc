"""`Population`: weighted particles for the caller; `Rows`: their layout in a run."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from steer.guidance.resampler import ess
from steer.onto import onto

NOTHING = -1e30
"""The log-weight of a row of weight zero: finite, so that differences of two are zero."""

__all__ = ["NOTHING", "Population", "Rows", "Wish", "check_times", "seen_mean"]


def seen_mean(rewards: Tensor, axis: int | None = None) -> Tensor:
    """Return the mean of the finite rewards (dropped particles have none); NaN if there are none.

    >>> float(seen_mean(torch.tensor([1.0, 3.0, -torch.inf])))
    2.0
    """
    return torch.where(rewards.isfinite(), rewards, torch.nan).nanmean(axis)


@dataclass
class Wish:
    """The caller's request to the sampler before its next step."""

    keep: Tensor | None = None
    stop: bool = False
    looked: bool = False


@dataclass(frozen=True)
class Population:
    """Weighted particles at one time, with a leading prompt axis (p,) if the caller gave one.

    Attributes:
        x: the particles, (n, *event) or (p, n, *event).
        time: where they are.
        log_w: log-weights since the last resampling, unnormalised, (n,) or (p, n).
        log_z: the estimate of log Z up to this time, theory (37), () or (p,); NaN after `keep`.
        reward: the reward of the potential's view, in its own units, (n,) or (p, n); NaN before
            the first evaluation.
        ess: the effective sample size, () or (p,).
        images: the decoded images that the reward scored at t = 1, (n, ...) or (p, n, ...); None
            before.
        clean: the clean sample on which the reward was evaluated, shaped as `x`; None if there is
            none.
        positions: indices of these prompts in the caller's whole list.
        nfe: network calls per particle so far, if they are counted: theory (51).
        ancestors: the start that each particle descends from, as its index among those of its
            prompt, (n,) or (p, n); None if the sampler does not record it.
        weighed: the effective sample size before this step's resampling, () or (p,); None if it
            was not computed: then it equals `ess`.
        wish: the caller's request, set by `keep` and `stop`.
    """

    x: Tensor
    time: float
    log_w: Tensor
    log_z: Tensor
    reward: Tensor
    ess: Tensor
    images: Tensor | None = None
    clean: Tensor | None = None
    positions: Sequence[int] = (0,)
    nfe: float = float("nan")
    ancestors: Tensor | None = None
    weighed: Tensor | None = None
    wish: Wish = field(default_factory=Wish, repr=False, compare=False)

    def keep(self, index: Tensor | Sequence[int] | Sequence[Sequence[int]]) -> None:
        """Continue with only these particles, in repeated copies.

        Their weights are reset. A selection by hand no longer samples the tilt, so `log_z` is NaN
        from then on. After the last step there is nothing to continue, and nothing changes: select
        the pictures themselves.

        Args:
            index: which to keep, (k,) for every prompt or (p, k), k at least 1.

        Raises:
            ValueError: no index, or an index that does not exist.
        """
        chosen = torch.as_tensor(index).cpu()
        lead, n = self.log_w.shape[:-1], self.log_w.shape[-1]
        fits = chosen.ndim >= 1 and chosen.shape[-1] > 0 and chosen.shape[:-1] in {(), lead}
        whole = not chosen.is_floating_point() and chosen.dtype != torch.bool
        if not fits or not whole or bool(((chosen < 0) | (chosen >= n)).any()):
            raise ValueError(
                f"cannot keep {index}: give the indices of the particles to keep, whole numbers "
                f"from 0 to {n - 1}, one list or one for each prompt"
            )
        self.wish.keep = chosen

    def stop(self) -> None:
        """End the run: the sampler makes one jump to t = 1 and yields a last population.

        `log_z` is NaN from then on, because the stop may depend on the population.
        """
        self.wish.stop = self.wish.looked = True

    def alone(self) -> "Population":
        """Return the population of the first prompt, without the prompt axis."""
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        first: dict[str, Any] = {k: v[0] for k, v in parts.items() if isinstance(v, Tensor)}
        return replace(self, **first)


@dataclass(frozen=True)
class Rows:
    """The rows of a run, flat and prompt-major: p prompts of n particles.

    Attributes:
        lead: (n,), or (p, n) where the caller gave a prompt axis.
        position: index of the first prompt in the caller's whole list.
        asked: the reward's prompts, one for each prompt or one for all.
    """

    lead: tuple[int, ...]
    position: int = 0
    asked: Sequence[str] | None = None

    @classmethod
    def of(
        cls,
        x0: Tensor,
        event_shape: Sequence[int],
        position: int = 0,
        asked: Sequence[str] | None = None,
    ) -> "Rows":
        """Return the rows of a start (n, *event) or (p, n, *event).

        Raises:
            ValueError: it has another shape, or its prompts are not the reward's.
        """
        event = tuple(event_shape)
        lead = tuple(x0.shape[: x0.ndim - len(event)])
        if tuple(x0.shape[len(lead) :]) != event or len(lead) not in {1, 2} or 0 in lead:
            raise ValueError(
                f"a start of shape {tuple(x0.shape)}: this flow wants (n, {event}) or, with "
                f"prompts, (p, n, {event}), events of shape {event}"
            )
        rows = cls(lead, position, asked)
        if asked is not None and len(asked) not in {1, rows.p}:
            raise ValueError(
                f"the potential has {len(asked)} prompts for the reward, the start has {rows.p}: "
                f"give x0 as ({len(asked)}, n, *event)"
            )
        return rows

    @property
    def p(self) -> int:
        """The number of prompts."""
        return 1 if len(self.lead) == 1 else self.lead[0]

    @property
    def n(self) -> int:
        """The number of particles of each prompt."""
        return self.lead[-1]

    @property
    def positions(self) -> range:
        """The indices of the prompts in the caller's whole list."""
        return range(self.position, self.position + self.p)

    def flat(self, x0: Tensor) -> Tensor:
        """Return a start as rows (p * n, *event)."""
        x0 = x0.clone() if x0.is_inference() else x0.detach()  # for gradients
        return x0.reshape(self.p * self.n, *x0.shape[len(self.lead) :])

    def kept(self, index: Tensor) -> Tensor:
        """Return the rows that replace all rows when these particles are kept, (p * n,)."""
        chosen = index.expand(self.p, -1) if index.ndim == 1 else index
        turns = chosen[:, torch.arange(self.n) % chosen.shape[1]]
        return (turns + self.n * torch.arange(self.p)[:, None]).flatten()

    def population(
        self,
        x: Tensor,
        time: float,
        reward: Tensor,
        images: Tensor | None = None,
        log_w: Tensor | None = None,
        log_z: Tensor | None = None,
        ancestors: Tensor | None = None,
        clean: Tensor | None = None,
        weighed: Tensor | None = None,
    ) -> Population:
        """Return the population of rows (p * n, ...) for the caller; missing weights are zero."""
        reward = reward.reshape(self.lead)
        zero = torch.zeros_like(reward)
        log_w = zero if log_w is None else log_w.reshape(self.lead)
        log_z = zero.sum(-1) if log_z is None else log_z.reshape(self.lead[:-1])
        x = x.reshape(*self.lead, *x.shape[1:])
        if images is not None:
            images = images.reshape(*self.lead, *images.shape[1:])
        if clean is not None:
            clean = clean.reshape(*self.lead, *clean.shape[1:])
        if ancestors is not None:
            ancestors = ancestors.reshape(self.lead)
        if weighed is not None:
            weighed = onto(weighed.reshape(self.lead[:-1]), x.device)
        return Population(
            x, time, log_w, log_z, reward, ess(log_w), images, clean, self.positions,
            ancestors=ancestors, weighed=weighed,
        )  # fmt: skip

    def starts(self) -> Tensor:
        """Return each row's own index among the particles of its prompt, (p * n,)."""
        return torch.arange(self.n).repeat(self.p)

    def refuse_no_weight(self, log_w: Tensor) -> None:
        """Raise an error for the first prompt whose particles all have weight zero.

        Args:
            log_w: (p, n).

        Raises:
            FloatingPointError: there is such a prompt; the message names it.
        """
        none = (log_w.amax(1) < NOTHING / 2).nonzero()
        if len(none):
            i = int(none[0])
            name = f" ({self.asked[i % len(self.asked)]!r})" if self.asked else ""
            raise FloatingPointError(
                f"no particle of prompt {self.position + i}{name} has a weight: its reward is not "
                "finite for any of them; check the reward's logarithms and divisions"
            )

    def refuse_not_finite(self, what: str, values: Tensor, where: str) -> None:
        """Raise an error for the first row that is not finite.

        Args:
            what: name of the numbers.
            values: one number per row, (p * n,).
            where: step and time.

        Raises:
            FloatingPointError: a number is not finite; the message names prompt, particle and
                step.
        """
        bad = (~torch.isfinite(values)).nonzero()
        if not len(bad):
            return
        row = int(bad[0])
        i = row // self.n
        name = f" ({self.asked[i % len(self.asked)]!r})" if self.asked else ""
        raise FloatingPointError(
            f"the {what} is {float(values[row])} for prompt {self.position + i}{name}, particle "
            f"{row % self.n}, {where}: a reward must be finite for every picture; check its "
            "logarithms and divisions, or raise the temperature if it only overflows"
        )


def check_times(times: Sequence[float]) -> None:
    """Raise a ValueError unless times increase within [0, 1], at least two of them."""
    ts = list(times)
    if len(ts) < 2 or not (ts[0] >= 0 and ts[-1] <= 1) or not all(a < b for a, b in pairwise(ts)):
        raise ValueError(f"times must increase within [0, 1], at least two of them; got {ts}")
