"""What is asked of a run, as the page's controls say it. It loads no network."""

import math
import shlex
from dataclasses import dataclass, field
from typing import Any

import yaml

__all__ = ["Ask", "options_text"]

BESIDE = ("temperature", "strength", "target", "budget", "on_bad_reward")
"""Options of `steer sample` that are not the method's, and stand with them on the page."""

CONTROLS = ("prompts", "reward", "method", "particles", "steps", "seed")


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
        for name in CONTROLS:
            if name in read:
                raise ValueError(f"options: {name} has a field of its own, set it there")
        return cls(lines, reward, method, int(particles), int(steps), int(seed), read)

    @property
    def keywords(self) -> dict[str, Any]:
        """The arguments of `steer.sample` behind flow, reward and prompts."""
        return {
            "particles": self.particles, "steps": self.steps, "method": self.method,
            "seed": self.seed, **self.options,
        }  # fmt: skip

    @property
    def own(self) -> dict[str, Any]:
        """The method's own options."""
        return {k: v for k, v in self.options.items() if k not in BESIDE}

    def settings(self, model: str, out: str) -> dict[str, Any]:
        """Return the options of `steer sample` that make the same pictures."""
        beside = {k: v for k, v in self.options.items() if k in BESIDE}
        prompt = self.prompts[0] if len(self.prompts) == 1 else list(self.prompts)
        return {
            "model": model, "reward": self.reward, "prompt": prompt, "method": self.method,
            "particles": self.particles, "steps": self.steps, "seed": self.seed, **beside,
            **({"options": self.own} if self.own else {}), "out": out,
        }  # fmt: skip

    def command(self, model: str, out: str) -> str:
        """Return the command line that makes the same pictures."""
        parts = [
            f"--{name} {shlex.quote(value if isinstance(value, str) else _flow(value))}"
            for name, value in self.settings(model, out).items()
        ]
        return "steer sample " + " ".join(parts)

    def python(self, model: str) -> str:
        """Return the Python that makes the same pictures."""
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


def options_text(options: dict[str, Any]) -> str:
    """Return options as the page's field shows them, empty where there are none.

    >>> options_text({"scale": 0.3, "window": [0.0, 0.5]})
    '{scale: 0.3, window: [0.0, 0.5]}'
    """
    return _flow(options) if options else ""
