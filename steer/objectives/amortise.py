"""Amortised guidance: generate a guided population once, and regress the map on it."""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from steer.noise import Noise
from steer.objectives.batch import Batch, Objective
from steer.objectives.parts import distil, squared
from steer.objectives.regression import velocity_loss
from steer.onto import onto
from steer.sampling.methods import TABLE, check_options
from steer.sampling.run import sample

__all__ = ["Amortise", "Drawn"]

COUPLED = ("fmrg-j",)
"""Methods whose picture is a function of its noise: the map can learn the pairs."""

Drawn = Mapping[str, Tensor]
"""A prompt's guided samples: "x_0", "x_1" (m, *event) and "log_w" (m,)."""


class Amortise(Objective):
    """Regress the map on guided samples of the base, generated once for each prompt.

    With an exact method (`split`) they are weighted samples of the tilt, theory (15). The velocity
    is fitted to them by flow matching, theory (11), whose minimum is the tilt's own velocity
    `E_q[x'_t | x_t]`; the map follows its velocity by self-distillation. The optimum is the
    exponential tilt, up to the population's own error.

    With a method whose picture is a function of its noise (`fmrg-j`) the pairs (x_0, x_1) are
    learned as they are: `|X(s,1,X(0,s,x_0)) - x_1|²`, s = 0 in half of the rows. One jump then
    gives what guidance needed many steps for.

    A prompt's population is a function of (seed, prompt, round) and of the base alone: a resumed
    run generates the same population again.

    Args:
        method: one of `steer.METHODS`.
        particles: samples per prompt in a round.
        guide_steps: steps of the method.
        visits: batches of a prompt between two rounds, or steps if there are no prompts; None: one
            round for the whole run.
        distil: weight of the self-distillation, for weighted populations.
        group: rows of each prompt in a batch.
        step: shortest and longest Heun step of the self-distillation.
        options: options of the method, see `steer.methods.method_options`.

    Raises:
        ValueError: an unknown method or option, or fewer particles than rows of a prompt.
    """

    uneven = True  # the process that first gets a prompt computes its guidance

    per_call = False

    def __init__(
        self,
        method: str = "split",
        particles: int = 8,
        guide_steps: int = 16,
        visits: int | None = None,
        distil: float = 1.0,
        group: int = 4,
        step: tuple[float, float] = (0.03, 0.13),
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        check_options(method, options or {})
        if particles < group:
            raise ValueError(
                f"{particles} particles for {group} rows of a prompt: draw at least as many"
            )
        self.method, self.particles, self.guide_steps = method, particles, guide_steps
        self.visits, self.distil, self.group = visits, distil, group
        self.step, self.options = (float(step[0]), float(step[1])), dict(options or {})
        self.coupled = method in COUPLED
        self.differentiable = TABLE[method].gradient
        self.tempered = TABLE[method].tempered
        self._drawn: dict[tuple[str, int], Drawn] = {}

    def population(self, batch: Batch, prompt: int, turn: int) -> Drawn:
        """Return the samples of a prompt in a round, generated if they are missing.

        Args:
            batch: its base, reward and temperature are used.
            prompt: an index into its prompts.
            turn: index of the round.
        """
        names = batch.prompts
        name = "" if names is None else names[prompt]
        key = (name, turn)
        if key not in self._drawn:
            for old in [k for k in self._drawn if k[0] == name]:
                del self._drawn[old]
            asked = None if batch.asked is None else batch.asked[prompt]
            self._drawn[key] = self._draw(batch, None if names is None else name, asked, turn)
        return self._drawn[key]

    def _draw(self, batch: Batch, name: str | None, asked: str | None, turn: int) -> Drawn:
        if batch.unbound is None:
            raise ValueError(
                "amortise binds the prompts itself: give the batch its base without bound prompts"
            )
        digest = hashlib.blake2b((name or "").encode(), digest_size=4).digest()
        place, seed = int.from_bytes(digest, "little"), batch.draws.seed * 7919 + turn
        drawn = sample(
            batch.unbound, batch.reward, None if name is None else [name], self.particles,
            self.guide_steps, self.method, batch.temperature if self.tempered else None,
            seed=seed, reward_prompts=asked, position=place, **self.options,
        )  # fmt: skip
        noise = Noise(seed, [place], self.particles, step="start", dtype=batch.draws.dtype)
        lead = drawn.x.ndim - len(batch.base.event_shape) - 1
        x_1, log_w = (drawn.x[0], drawn.log_w[0]) if lead else (drawn.x, drawn.log_w)
        return {
            "x_0": noise.normal(batch.base.event_shape),
            "x_1": x_1.detach().cpu(),
            "log_w": log_w.detach().cpu(),
        }

    def rows(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Sample x_0 and x_1 for the rows from their prompts' populations, by weight."""
        p = 1 if batch.prompts is None else len(batch.prompts)
        places = batch.draws.uniform(host=True).reshape(p, -1)
        noise, data = [], []
        for i in range(p):
            visit = batch.draws.step if batch.epochs is None else batch.epochs[i]
            turn = 0 if self.visits is None else visit // self.visits
            drawn = self.population(batch, i, turn)
            share = drawn["log_w"].softmax(0).cumsum(0)
            index = torch.searchsorted(share, places[i].to(share)).clamp(max=len(share) - 1)
            noise.append(drawn["x_0"][index])
            data.append(drawn["x_1"][index])
        x_0, x_1 = torch.cat(noise), torch.cat(data)
        device, dtype = batch.draws.device, batch.draws.dtype
        return onto(x_0, device).to(dtype), onto(x_1, device).to(dtype)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return {"loss", ...}; the first batches of a prompt also compute its guidance."""
        with torch.no_grad():
            x_0, x_1 = self.rows(batch)
        return self._pairs(batch, x_0, x_1) if self.coupled else self._law(batch, x_1)

    def _pairs(self, batch: Batch, x_0: Tensor, x_1: Tensor) -> dict[str, Tensor]:
        s = torch.where(batch.draws.uniform() < 0.5, 0.0, batch.draws.uniform())
        x_s = batch.student.jump(x_0, batch.zeros(), s)
        y = batch.student.jump(x_s, s, 1.0)
        return {"loss": (squared(y - x_1) / x_1[0].numel()).mean()}

    def _law(self, batch: Batch, x_1: Tensor) -> dict[str, Tensor]:
        noise, t = batch.noise(), batch.draws.uniform()
        tilt = velocity_loss(batch.student, noise, x_1, t).mean()
        path = batch.student.path
        off = distil(batch, lambda s: path.interpolate(noise, x_1, s), *self.step)
        return {"loss": tilt + self.distil * off, "tilt": tilt.detach(), "off": off.detach()}
