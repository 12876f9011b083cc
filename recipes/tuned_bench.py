"""How `steer eval --lora` samples and measures: the same noise for all rows."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import steer
from recipes.inputs import Asked
from recipes.methods import method, tempered
from recipes.partial import Unit
from recipes.tuned_rows import Row
from steer.adapters.lora import Adapted
from steer.flow import device_of, flat_prompts
from steer.noise import Noise
from steer.reward import Reward, score
from steer.tuning.statistics import Drift, features_of, velocity_distance

__all__ = ["Bench"]

BATCH = 64  # rows per unit
DRIFT = 8  # number of prompts for the drift


class Bench:
    """The flows, and the measurements of their pictures.

    Args:
        flow: the base.
        adapters: name -> the base with them.
        scorers: "reward", "judge" and held-out rewards.
        asked: the prompts.
        particles: pictures of each prompt.
    """

    def __init__(
        self,
        flow: steer.FlowMap,
        adapters: Mapping[str, Adapted],
        scorers: Mapping[str, Any],
        asked: Asked,
        particles: int,
    ) -> None:
        self.flow, self.adapters, self.asked, self.particles = flow, adapters, asked, particles
        self.scorers: dict[str, Reward] = {k: s.to(device_of(flow)) for k, s in scorers.items()}
        self.features = features_of(scorers.get("judge"))

    def flow_of(self, row: Row) -> steer.FlowMap:
        """Return the base, or the tuned flow at the row's scale."""
        return self.adapters[row.adapter].at(row.scale) if row.adapter else self.flow

    def drawn(self, row: Row) -> int:
        """Return the number of particles of a prompt that are sampled at once."""
        return row.count * (1 if tempered(row.method) else self.particles)

    def size(self, row: Row) -> int:
        """Return the number of prompts per unit, as many as fill a batch."""
        return max(1, BATCH // self.drawn(row))

    @torch.no_grad()
    def run(self, unit: Unit[Row]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Sample and measure a unit -> scores and features, (p, k, ...), first images, and cost.

        Picture j of a best-of-n is chosen from the noises j, j + n, j + 2 n, ..., with n the
        number of pictures of a prompt, so that the base's picture is one of the candidates.
        """
        row, (names, questions) = unit.row, self.asked.part(unit.start, unit.end)
        drawn = self.drawn(row)
        result = steer.sample(
            self.flow_of(row), self.scorers["reward"], names, drawn, row.steps,
            method(row.method), seed=unit.seed, position=unit.start, reward_prompts=questions,
            progress=False, **row.options,
        )  # fmt: skip
        if result.images is None:
            raise ValueError(
                "this model does not decode to pictures (n, 3, h, w), so there is nothing to "
                "compare"
            )
        images = result.images
        if row.count > 1:
            kept = drawn // row.count
            choice = result.rewards.unflatten(1, (row.count, kept)).argmax(1)
            index = choice * kept + torch.arange(kept, device=choice.device)
            images = images[torch.arange(len(names), device=index.device)[:, None], index]
        k = images.shape[1]
        flat, texts = images.flatten(0, 1), flat_prompts(questions or names, len(names) * k)
        tensors = {"images": images[:, :1], "features": self.features(flat).unflatten(0, (-1, k))}
        tensors |= {n: score(s, flat, texts).reshape(-1, k) for n, s in self.scorers.items()}
        calls = result.nfe * row.count
        calls += tempered(row.method) * result.costs["temperature_nfe_per_prompt"]
        notes = {"nfe": calls, "seconds": result.costs["seconds"] / len(flat)}
        return {name: t.float() for name, t in tensors.items()}, notes

    def drifts(self, rows: Sequence[Row], seed: int) -> dict[tuple[str, float], Drift]:
        """Return the drift of each flow from the base, on the noise of the first pictures.

        It is measured on a few prompts, with one picture each.
        """
        names = self.asked.prompts[:: max(1, len(self.asked.prompts) // DRIFT)][:DRIFT]
        noise = Noise(seed, range(len(names)), 1, step="start", device=device_of(self.flow))
        x_0, found = noise.normal(self.flow.event_shape), {}
        for row in rows:
            if row.adapter and (row.adapter, row.scale) not in found:
                flows = self.flow_of(row).given(names), self.flow.given(names)
                found[row.adapter, row.scale] = velocity_distance(*flows, x_0)
        return found
