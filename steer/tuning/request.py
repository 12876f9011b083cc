"""The request of a tuning run, which is frozen and validates itself when it is created."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from steer.adapters.attach import Layers, attach
from steer.adapters.inject import adapt
from steer.adapters.lora import START, Adapted
from steer.flow import FlowMap, device_of
from steer.identity import sources
from steer.objectives.batch import Objective
from steer.objectives.table import name_of as objective_name
from steer.objectives.table import options_of
from steer.reward import Reward, name_of, refuse_inference
from steer.sampling.calibrate import ROWS, learn, spread
from steer.tuning.prompts import Prompts
from steer.tuning.settings import RUNTIME, Settings

__all__ = ["Tuning"]

STRENGTH = 3.0
"""The temperature is by default the reward's spread divided by this."""


@dataclass(frozen=True)
class Tuning:
    """A flow, a reward, and how the flow is tuned by the reward.

    Attributes:
        flow: the base; it is never changed.
        reward: what is tuned for.
        prompts: tuning prompts.
        objective: the tuning objective.
        steps: optimizer steps.
        temperature: what the reward is divided by, in its units; None: set by its spread.
        strength: the temperature is then the spread divided by this; None: by 3.
        judge: a held-out reward that measures whether pictures became better; it is never
            optimised.
        held_out: name -> further held-out rewards, measured at checks.
        seed: seed of all random numbers.
        settings: settings of the run.
        start: adapters to tune further, which are included in the base of the run; None: new ones.

    Raises:
        ValueError: both temperature and strength, one that is not above zero, no steps, or a flow
            that already has adapters.
    """

    flow: FlowMap
    reward: Reward
    prompts: Prompts
    objective: Objective
    steps: int
    temperature: float | None
    strength: float | None
    judge: Reward | None
    held_out: Mapping[str, Reward]
    seed: int
    settings: Settings
    start: Layers | None = None

    def __post_init__(self) -> None:
        if self.temperature is not None and self.strength is not None:
            raise ValueError("temperature and strength both given: give one of them")
        for name in ("temperature", "strength"):
            number = getattr(self, name)
            if number is not None and not (number > 0 and math.isfinite(number)):
                raise ValueError(f"{name} must be a number above zero, got {number}")
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if isinstance(self.flow, Adapted):
            raise ValueError(
                "this flow has adapters already: give its base as flow and the adapters as start, "
                "see steer.adapters.attach.parted"
            )
        if self.start is not None and self.settings.targets:
            raise ValueError(
                "targets choose the layers of new adapters, and those that are on the flow are "
                "tuned further: leave targets out, or take the adapters off first"
            )
        if self.settings.sharded and self.objective.uneven:
            raise ValueError(
                f"objective {objective_name(self.objective)!r} guides each prompt on the process "
                "that has it, and a base that is split needs all processes for each call: use "
                "ddp, where each holds the base, or another objective"
            )
        if "gradient" in self.flow.lacks:
            raise ValueError(
                "tuning takes gradients through the model, and " + self.flow.lacks["gradient"]
            )
        refuse_inference("model", self.flow)
        if self.objective.differentiable:
            refuse_inference("reward", self.reward)

    def adapted(self, device: torch.device) -> Adapted:
        """Return the flow with the run's adapters on its device; the base stays where it is.

        A base that will be sharded over processes is not moved, since it may not fit on one
        device.
        """
        chosen, here = self.settings, device_of(self.flow.denoiser)
        if chosen.sharded:
            device = here
        if self.flow.component and here.type != device.type:
            raise ValueError(
                f"the pipeline is on {here} and the run would be on {device}: move the whole of "
                f"it first, pipe.to({device.type!r}), since its text encoders are called too; or "
                f"say accelerator={here.type!r}"
            )
        if self.start is not None:
            tuned = attach(self.flow, self.start).to(device)
            tuned.add(START)
            tuned.checkpoint = chosen.checkpointing
            return tuned
        tuned = adapt(
            self.flow, chosen.rank, chosen.alpha, targets=chosen.targets, seed=self.seed
        ).to(device)
        tuned.checkpoint = chosen.checkpointing
        return tuned

    def bind(self, tuned: Adapted) -> None:
        """Bind all prompts of the run to a flow, so that none is encoded after it has moved."""
        texts = [*(self.prompts.prompts or ()), *(self.settings.check_prompts or ())]
        if self.prompts.prompts is not None and self.flow.component:
            tuned.given(list(dict.fromkeys(texts)))

    def calibrate(self, base: FlowMap, known: float | None = None) -> float:
        """Estimate the scales of the reward, and return the temperature of the run.

        Args:
            base: the flow for one-jump samples, on the device of the run; the reward is moved
                there.
            known: the temperature of the existing run, if there is one.

        Raises:
            ValueError: the reward has a standard deviation of zero.
        """
        asked = self.prompts.prompts, self.prompts.asked, self.seed
        size = self.settings.micro_batch or ROWS
        learn(base, self.reward, *asked, batch_size=size)
        for given in (self.temperature, known):
            if given is not None:
                return given
        deviation = spread(base, self.reward, *asked, batch_size=size)
        return deviation / (self.strength or STRENGTH)

    def identity(self, temperature: float, base_sha256: str) -> dict[str, Any]:
        """Return the values that identify a run, as plain JSON values."""
        chosen = self.settings
        return {
            "objective": objective_name(self.objective), "options": options_of(self.objective),
            "reward": name_of(self.reward), "prompts": self.prompts.prompts,
            "reward_prompts": self.prompts.asked, "temperature": temperature,
            "strength": self.strength, "seed": self.seed, "base": self.flow.name,
            "calls": [chosen.micro, chosen.devices] if self.objective.per_call else None,
            "base_sha256": base_sha256, "steps": self.steps,
            "sources": sources(self.reward, self.flow, files=_made_of(self.reward)),
            "watched": self._watched(), "start": None if self.start is None else _hash(self.start),
            "settings": {k: v for k, v in asdict(chosen).items() if k not in RUNTIME},
        }  # fmt: skip

    def _watched(self) -> dict[str, Any]:
        """Return the names and files of the held-out rewards that measure the run."""
        parts = [part for part in (self.judge, *self.held_out.values()) if part is not None]
        return {
            "judge": None if self.judge is None else name_of(self.judge),
            "held_out": {name: name_of(part) for name, part in self.held_out.items()},
            "sources": sources(*parts, files=[file for part in parts for file in _made_of(part)]),
        }

    def notes(self, temperature: float, base_sha256: str) -> dict[str, Any]:
        """Return the metadata of the run for the adapters' file, see `steer.adapters.card`."""
        texts = self.prompts.prompts or []
        known = self.identity(temperature, base_sha256)
        kept = "reward", "objective", "options", "temperature", "seed", "settings", "base_sha256"
        return {name: known[name] for name in kept} | {
            "prompts": texts[:8], "prompt_count": len(texts), "batch": self.settings.batch_size,
        }  # fmt: skip


def _hash(layers: Layers) -> str:
    """Return a hash of adapters."""
    digest = hashlib.sha256()
    for name, pair in sorted(layers.items()):
        digest.update(name.encode())
        for p in pair:
            digest.update(p.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _made_of(reward: Reward) -> list[Path]:
    """Return the files, other than code, that a reward and its parts depend on."""
    parts = reward.modules() if isinstance(reward, nn.Module) else [reward]
    return [file for part in parts for file in getattr(part, "made_of", ())]
