"""A run that a person watches: step by step, paused, stopped, and told which particles to keep."""

import math
import shlex
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import yaml
from PIL import Image
from torch import Tensor

import steer
from steer.flow import FlowMap
from steer.pictures import to_pil
from steer.reward import Reward, score

__all__ = ["Ask", "Job", "Shown"]


@dataclass(frozen=True)
class Ask:
    """What is asked of a run, as the page's controls say it.

    Attributes:
        prompts: one or more.
        reward: its text.
        method: its name.
        particles: of each prompt.
        steps: of the run.
        seed: of all randomness.
        options: of the method, and temperature or strength.
    """

    prompts: tuple[str, ...]
    reward: str
    method: str
    particles: int
    steps: int
    seed: int
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls, prompts: str, reward: str, method: str, particles: float, steps: float, seed: float,
        options: str,
    ) -> "Ask":  # fmt: skip
        """Read the controls.

        Raises:
            ValueError: no prompt, or options that are no mapping.
        """
        lines = tuple(line.strip() for line in prompts.splitlines() if line.strip())
        if not lines:
            raise ValueError("write a prompt, or several, a line each")
        try:
            read = yaml.safe_load(options or "{}")
        except yaml.YAMLError:
            read = None
        if not isinstance(read, dict):
            raise ValueError(f"options {options!r}: write them as {{scale: 0.3, brake: 0.8}}")
        return cls(lines, reward, method, int(particles), int(steps), int(seed), read)

    @property
    def keywords(self) -> dict[str, Any]:
        """The arguments of `steer.sample` behind flow, reward and prompts."""
        return {
            "particles": self.particles, "steps": self.steps, "method": self.method,
            "seed": self.seed, **self.options,
        }  # fmt: skip

    def command(self, model: str, out: str) -> str:
        """Return the command line that samples the same pictures."""
        told = {k: v for k, v in self.options.items() if k in ("temperature", "strength")}
        own = {k: v for k, v in self.options.items() if k not in told}
        prompt = self.prompts[0] if len(self.prompts) == 1 else list(self.prompts)
        asked = {
            "model": model, "reward": self.reward, "prompt": prompt, "method": self.method,
            "particles": self.particles, "steps": self.steps, "seed": self.seed, **told,
            **({"options": own} if own else {}), "out": out,
        }  # fmt: skip
        parts = [
            f"--{name} {shlex.quote(value if isinstance(value, str) else _flow(value))}"
            for name, value in asked.items()
        ]
        return "steer sample " + " ".join(parts)

    def python(self, model: str) -> str:
        """Return the Python that samples the same pictures."""
        told = "".join(f", {name}={value!r}" for name, value in self.keywords.items())
        return (
            "import steer\n\n"
            f"flow = steer.load({model!r})\n"
            f"result = steer.sample(flow, {self.reward!r}, {list(self.prompts)!r}{told})\n"
        )


def _flow(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=math.inf).strip().removesuffix(
        "\n..."
    )  # fmt: skip


@dataclass
class Shown:
    """What the page shows after a step.

    Attributes:
        images: what the reward was asked about: lookaheads, and pictures at the end.
        captions: the reward of each.
        step: how many steps were made.
        calls: network calls a particle so far.
        reward: its mean over the particles.
        judge: the held-out judge's mean, or NaN.
    """

    images: list[Image.Image]
    captions: list[str]
    step: int
    calls: float
    reward: float
    judge: float


class Job:
    """A run of one browser tab.

    Args:
        flow: the model.
        reward: what guides.
        ask: what is asked.
        judge: says what became of the pictures; it is not climbed.
    """

    def __init__(self, flow: FlowMap, reward: Reward, ask: Ask, judge: Reward | None) -> None:
        self.flow, self.reward, self.ask, self.judge = flow, reward, ask, judge
        self.stream = steer.stream(
            flow, reward, list(ask.prompts), batch_size=None, **ask.keywords
        )
        self.bound = flow.given(list(ask.prompts))
        self.ended = threading.Event()
        self._free = threading.Event()
        self._free.set()
        self._keep: list[int] | None = None
        self._stop = False
        self.touched = False
        self.result: steer.Result | None = None

    @property
    def paused(self) -> bool:
        """Whether the run waits after the step that it makes, or made."""
        return not self._free.is_set()

    def pause(self) -> None:
        """Wait after this step."""
        self._free.clear()

    def go_on(self, keep: Sequence[int] | None = None) -> None:
        """Go on, from some particles alone where they are given (their numbers in the strip)."""
        self._keep = None if not keep else sorted(set(keep))
        self._free.set()

    def stop(self) -> None:
        """End the run by one jump to the pictures."""
        self._stop = True
        self._free.set()

    def end(self) -> None:
        """Drop the run: nobody looks at it any more."""
        self.ended.set()
        self._free.set()

    @torch.no_grad()
    def unguided(self) -> list[Image.Image]:
        """Return the same noise's pictures without guidance."""
        made = steer.sample(
            self.flow, self.reward, list(self.ask.prompts), self.ask.particles, self.ask.steps,
            "none", seed=self.ask.seed, progress=False,
        )  # fmt: skip
        assert made.images is not None
        return [to_pil(x) for x in made.images.flatten(0, 1)]

    def steps(self) -> Iterator[Shown]:
        """Make the steps; after each, wait while the run is paused, and do what was wished."""
        for k, population in enumerate(self.stream, 1):
            yield self._shown(population, k)
            while not self._free.wait(0.2):
                pass
            if self.ended.is_set():
                return
            if self._keep is not None:
                self._choose(population)
            if self._stop and population.time < 1:
                population.stop()
                self.touched = True
        self.result = self.stream.collect()

    def _choose(self, population: steer.Population) -> None:
        """Keep the chosen particles of each prompt; all of a prompt with none that is chosen."""
        assert self._keep is not None
        n, p = self.ask.particles, len(self.ask.prompts)
        rows = [[i % n for i in self._keep if i // n == j] or list(range(n)) for j in range(p)]
        most = max(len(row) for row in rows)
        population.keep([[row[i % len(row)] for i in range(most)] for row in rows])
        self._keep, self.touched = None, True

    @torch.no_grad()
    def _shown(self, population: steer.Population, k: int) -> Shown:
        seen = population.x if population.clean is None else population.clean
        images = population.images
        if images is None:
            images = self.bound.decode(seen.flatten(0, 1))
        flat = images.reshape(-1, *images.shape[-3:]).clamp(0, 1)
        reward = population.reward.flatten()
        captions = ["" if r.isnan() else f"{float(r):.4g}" for r in reward]
        known = reward[~reward.isnan()]
        mean = float(known.mean()) if len(known) else math.nan
        return Shown(
            [to_pil(x) for x in flat], captions, k, population.nfe, mean, self._judged(flat)
        )

    def _judged(self, images: Tensor) -> float:
        if self.judge is None:
            return math.nan
        texts = [p for p in self.ask.prompts for _ in range(self.ask.particles)]
        return float(score(self.judge, images, texts).mean())
