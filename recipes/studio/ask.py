"""The settings of a run, read from the page's controls. It loads no network."""

import json
import math
import shlex
from dataclasses import dataclass, field
from typing import Any

import yaml

__all__ = ["Ask", "options_text", "whole_number"]

BESIDE = ("temperature", "strength", "target", "budget", "on_bad_reward")
"""Options of `steer sample` that do not belong to the method, but are entered with its options."""

CONTROLS = ("prompts", "reward", "method", "particles", "steps", "seed")

ABSENT = (
    "flow", "reward_prompts", "init_image", "init_time", "init_by", "batch_size", "position",
    "times", "options", "callback", "progress",
)  # fmt: skip
"""Other arguments of `steer.sample`, which are not options of a method and cannot be set here."""


def whole_number(name: str, value: float | None) -> int:
    """Return the whole number in a number field.

    Raises:
        ValueError: the field is empty, or does not contain a whole number.
    """
    if value is None or not math.isfinite(value) or value != int(value):
        raise ValueError(f"{name}: give a whole number, such as 0 or 7")
    return int(value)


@dataclass(frozen=True)
class Ask:
    """The settings of a run, read from the page's controls.

    Attributes:
        prompts: one or more prompts.
        reward: text of the reward.
        method: name of the method.
        particles: particles of each prompt.
        steps: steps of the run.
        seed: seed of all random numbers.
        options: options of the method, and temperature or strength.
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
        cls, prompts: str, reward: str, method: str, particles: float | None, steps: float | None,
        seed: float | None, options: str,
    ) -> "Ask":  # fmt: skip
        """Read the page's controls.

        Raises:
            ValueError: no prompt, an empty number, options that are not a mapping of names, or one
                that is not an option of a method.
        """
        lines = tuple(line.strip() for line in prompts.splitlines() if line.strip())
        if not lines:
            raise ValueError("write a prompt, or several, a line each")
        try:
            read = yaml.safe_load(options or "{}")
        except yaml.YAMLError:
            read = None
        if not isinstance(read, dict) or not all(isinstance(name, str) for name in read):
            raise ValueError(f"options {options!r}: write them as {{scale: 0.3, brake: 0.8}}")
        for name in CONTROLS:
            if name in read:
                raise ValueError(f"options: {name} has a field of its own, set it there")
        for name in ABSENT:
            if name in read:
                raise ValueError(
                    f"options: {name} is not an option of a method, and cannot be set on this "
                    "page: leave it out"
                )
        numbers = {"pictures": particles, "steps": steps, "seed": seed}
        return cls(lines, reward, method, *(whole_number(*one) for one in numbers.items()), read)

    @property
    def keywords(self) -> dict[str, Any]:
        """The arguments of `steer.sample` after flow, reward and prompts."""
        return {
            "particles": self.particles, "steps": self.steps, "method": self.method,
            "seed": self.seed, **self.options,
        }  # fmt: skip

    @property
    def own(self) -> dict[str, Any]:
        """The method's own options."""
        return {k: v for k, v in self.options.items() if k not in BESIDE}

    def settings(self, model: str, out: str, device: str | None = None) -> dict[str, Any]:
        """Return the options of `steer sample` that make the same pictures.

        Args:
            model: its text.
            out: the folder to write.
            device: that the studio was started with, if it was with one.
        """
        beside = {k: v for k, v in self.options.items() if k in BESIDE}
        prompt = self.prompts[0] if _is_text(self.prompts) else list(self.prompts)
        return {
            "model": model, "reward": self.reward, "prompt": prompt, "method": self.method,
            "particles": self.particles, "steps": self.steps, "seed": self.seed, **beside,
            **({"options": self.own} if self.own else {}),
            **({} if device is None else {"device": device}), "out": out,
        }  # fmt: skip

    def command(self, model: str, out: str, device: str | None = None) -> str:
        """Return the command line that makes the same pictures, see `settings`."""
        words = {
            name: value if isinstance(value, str) else _flow(value)
            for name, value in self.settings(model, out, device).items()
        }
        if not _is_text(self.prompts):  # all quoted, so that a prompt such as 1e3 is not a number
            words["prompt"] = json.dumps(self.prompts, ensure_ascii=False)
        return "steer sample " + " ".join(
            f"--{name}{'=' if word.startswith('-') else ' '}{shlex.quote(word)}"
            for name, word in words.items()
        )

    def python(self, model: str, device: str | None = None) -> str:
        """Return the Python that makes the same pictures, see `settings`."""
        where = "" if device is None else f", device={device!r}"
        told = "".join(f", {name}={value!r}" for name, value in self.keywords.items())
        return (
            "import steer\n\n"
            f"flow = steer.load({model!r}{where})\n"
            f"result = steer.sample(flow, {self.reward!r}, {list(self.prompts)!r}{told})\n"
        )


def _is_text(prompts: tuple[str, ...]) -> bool:
    """Return whether there is a single prompt that the command line reads as the same text.

    "null" and "[red, fox]" are read as YAML there, so they must be in a list.
    """
    try:
        return len(prompts) == 1 and yaml.safe_load(prompts[0]) == prompts[0]
    except (yaml.YAMLError, ValueError):  # ValueError: an invalid date
        return False


def _flow(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=math.inf).strip().removesuffix(
        "\n..."
    )  # fmt: skip


def options_text(options: dict[str, Any]) -> str:
    """Return options as shown in the page's field; "" if there are none.

    >>> options_text({"scale": 0.3, "window": [0.0, 0.5]})
    '{scale: 0.3, window: [0.0, 0.5]}'
    """
    return _flow(options) if options else ""
