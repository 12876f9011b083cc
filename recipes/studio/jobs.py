"""An interactive run: shown step by step, paused, stopped, continued with chosen particles."""

import math
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

import steer
from recipes.studio.ask import Ask
from steer.batches import Ceiling, in_batches, join_rows
from steer.flow import FlowMap, device_of
from steer.pictures import to_pil
from steer.reward import Reward, score

__all__ = ["Job", "Shown", "start_of"]


AHEAD = 4
"""Maximum number of steps that the sampler is ahead of the page, and keeps on its device."""


NO_PICTURES = (
    "the samples of this model are no pictures, and this page shows pictures: use `steer sample`, "
    "or start the studio with another model"
)


class Seen(NamedTuple):
    """A population after a step, with tensors that are no longer modified.

    Attributes:
        x: what is shown: clean samples, or pictures.
        decoded: whether x are pictures already.
        reward: reward of each particle.
        step: number of steps made, of `Job.total`.
        calls: network calls per particle so far.
        positions: indices of its prompts in the list; many pictures are sampled in groups of
            prompts, and with a target the prompts one by one.
    """

    x: Tensor
    decoded: bool
    reward: Tensor
    step: int
    calls: float
    positions: tuple[int, ...]


@dataclass
class Shown:
    """What the page shows after a step.

    Attributes:
        pictures: what the reward was evaluated on, (b, 3, h, w) in 8 bits on the CPU: lookaheads,
            and pictures at the end.
        captions: the reward of each picture.
        step: number of steps made.
        total: number of all steps; a run that is stopped makes fewer.
        calls: network calls per particle so far.
        reward: mean reward over the particles.
    """

    pictures: Tensor
    captions: list[str]
    step: int
    total: int
    calls: float
    reward: float

    @property
    def images(self) -> list[Image.Image]:
        """The pictures, created at each access."""
        return [to_pil(x / 255) for x in self.pictures]


class Job:
    """A run of one browser tab.

    The sampler runs in its own thread and puts events into `events`, so that showing a step does
    not delay the next one. It is at most `AHEAD` steps ahead of the page. The held-out reward is
    computed while nothing is sampled: when the run is paused, and at its end. Until then the
    pictures are kept in 8 bits on the CPU.

    Args:
        flow: the model.
        reward: the reward that guides.
        ask: the settings of the run.
        judge: the held-out reward, which does not guide.
    """

    def __init__(self, flow: FlowMap, reward: Reward, ask: Ask, judge: Reward | None) -> None:
        self.flow, self.reward, self.ask, self.judge = flow, reward, ask, judge
        self.stream = steer.stream(
            flow, reward, list(ask.prompts), batch_size=None, **ask.keywords
        )
        self.bound = flow.given(list(ask.prompts))
        request = self.stream.request
        self.per_group = len(request.grid) - 1
        self.total = len(request.groups) * self.per_group
        self.ended = threading.Event()
        self.events: SimpleQueue[tuple[str, Any]] = SimpleQueue()
        self.seconds: list[float] = []
        self._room = threading.Semaphore(AHEAD)
        self._ceiling = Ceiling()
        self._free = threading.Event()
        self._free.set()
        self._keep: list[int] | None = None
        self._stop = self._waits = False
        self._unjudged: list[tuple[float, Tensor, list[str]]] = []
        self.touched = False
        self.finished = False
        self.result: steer.Result | None = None

    @property
    def paused(self) -> bool:
        """Whether the run waits after the current step."""
        return not self._free.is_set()

    def pause(self) -> None:
        """Wait after this step, unless it is the last one.

        Raises:
            ValueError: the run is over.
        """
        self._going()
        self.events.put(("message", "pausing after this step"))
        self._free.clear()

    def go_on(self, keep: Sequence[int] | None = None) -> None:
        """Continue, with only the given particles (their indices in the strip) if there are any.

        Raises:
            ValueError: the run is over, or particles are chosen while it is not paused, when the
                strip may already have changed.
        """
        self._going()
        if keep and not self._waits:
            raise ValueError("press Pause first: what is kept is chosen while the run is paused")
        self._keep = None if not keep else sorted(set(keep))
        self._free.set()

    def stop(self) -> None:
        """End the run by one jump to the pictures.

        Raises:
            ValueError: the run is over.
        """
        self._going()
        self.events.put(("message", "stopping: one jump to the pictures"))
        self._stop = True
        self._free.set()

    def end(self) -> None:
        """Cancel the run, which is no longer shown."""
        self.ended.set()
        self._free.set()

    def _going(self) -> None:
        if self.finished:
            raise ValueError("this run is finished: press Steer to start another")

    @torch.no_grad()
    def unguided(self) -> list[Image.Image]:
        """Return the pictures of the same noise without guidance."""
        made = steer.sample(
            self.flow, self.reward, list(self.ask.prompts), self.ask.particles, self.ask.steps,
            "none", seed=self.ask.seed, progress=False,
        )  # fmt: skip
        if made.images is None:
            raise ValueError(NO_PICTURES)
        return [to_pil(x) for x in made.images.flatten(0, 1)]

    def work(self) -> None:
        """Run to the end, and put events into `events`; the last one is "over".

        Events: ("unguided", pictures), ("step", `Seen`), ("message", text), ("paused", None),
        ("done", result), ("failed", error), ("over", None).
        """
        try:
            self.events.put(("unguided", self.unguided()))
            if not self.ended.is_set():
                self._steps()
            if not self.ended.is_set():
                self.result = self.stream.collect()
                self.finished = True
                self.events.put(("done", self.result))
        except Exception as error:  # the page's own thread raises it again
            self.events.put(("failed", error))
        finally:
            self.finished = True
            self.events.put(("over", None))

    def _steps(self) -> None:
        before = time.perf_counter()
        group, positions, k = -1, (), 0
        for population in self.stream:
            if tuple(population.positions) != positions:
                group, positions, k = group + 1, tuple(population.positions), 0
            k += 1
            made = group * self.per_group + k
            while not self._room.acquire(timeout=0.2):
                if self.ended.is_set():
                    return
            self.seconds.append(time.perf_counter() - before)  # including the wait for the page
            self.events.put(("step", _seen(population, made)))
            if self.paused and population.time < 1:  # not after the end
                self._waits = True
                self.events.put(("paused", None))
                self._free.wait()
                self._waits = False
            if self.ended.is_set():
                return
            if self._keep is not None:
                self._choose(population)
            if self._stop and population.time < 1:
                population.stop()
                self.touched = True
            before = time.perf_counter()

    def _choose(self, population: steer.Population) -> None:
        """Keep the chosen particles of each prompt; all particles of a prompt without a choice."""
        assert self._keep is not None
        n, p = self.ask.particles, len(population.positions)
        rows = [[i % n for i in self._keep if i // n == j] or list(range(n)) for j in range(p)]
        most = max(len(row) for row in rows)
        population.keep([[row[i % len(row)] for i in range(most)] for row in rows])
        self._keep, self.touched = None, True

    @torch.no_grad()
    def shown(self, seen: Seen) -> Shown:
        """Return what the page shows for a step."""
        x, size = seen.x.flatten(0, 1), self.stream.request.rows
        if not seen.decoded:
            with self._ceiling.held():
                x = join_rows(in_batches(self.bound.decode, x, size))
        flat = x.clamp(0, 1).mul(255).round().byte().cpu()
        self._room.release()
        if self.judge is not None:
            n = self.ask.particles
            texts = [self.ask.prompts[i] for i in seen.positions for _ in range(n)]
            self._unjudged.append((seen.calls, flat, texts))
        reward = seen.reward.flatten()
        captions = ["" if r.isnan() else f"{float(r):.4g}" for r in reward]
        known = reward[~reward.isnan()]
        mean = float(known.mean()) if len(known) else math.nan
        return Shown(flat, captions, seen.step, self.total, seen.calls, mean)

    @torch.no_grad()
    def judged(self) -> list[tuple[float, float, int]]:
        """Return the held-out reward of the steps that were shown since the last call.

        There is one tuple per step: network calls per picture, mean, number of pictures.
        """
        waiting, self._unjudged = self._unjudged, []
        if self.judge is None:
            return []
        device = device_of(self.flow)
        return [
            (calls, float(score(self.judge, x.to(device) / 255, t).mean()), len(x))
            for calls, x, t in waiting
        ]


def start_of(result: steer.Result, i: int, particles: int) -> int:
    """Return the index of the noise from which a picture of a result started.

    Args:
        result: result for several prompts.
        i: index of the picture over all prompts, which may have fewer particles by now.
        particles: particles of each prompt at the start.
    """
    n = result.rewards.shape[1]
    of_prompt = i % n if result.ancestors is None else int(result.ancestors.flatten()[i])
    return i // n * particles + of_prompt


def _seen(population: steer.Population, k: int) -> Seen:
    images = population.images
    x = images
    if x is None:
        x = population.x if population.clean is None else population.clean
    return Seen(
        x.detach().clone(), images is not None, population.reward.detach().clone(), k,
        population.nfe, tuple(population.positions),
    )  # fmt: skip
