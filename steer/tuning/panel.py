"""Lightning callbacks of a tuning run: instruments, sheets, the best adapters, an early stop.

Everything is drawn from fixed noise for fixed prompts that are not tuned on, base beside tuned.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from steer.adapters.lora import Adapted
from steer.noise import Noise, noise_dtype
from steer.pictures import Row
from steer.reward import Reward, dissect
from steer.tuning.alarms import Alarm
from steer.tuning.instruments import Instruments, Reading
from steer.tuning.statistics import Drift, velocity_distance

__all__ = ["Panel"]

ROWS = 64

"""Rows of one network call when pictures are drawn for a check."""


class Panel:
    """Fixed prompts and fixed noise, and the base's pictures of them for each number of steps.

    Args:
        tuned: the flow with its adapters.
        prompts: what is drawn; None for a flow without prompts.
        samples: pictures of each prompt.
        reward: what is tuned for.
        judge: what is not.
        held_out: further rewards that are not tuned for.
        asked: what the rewards are asked, where that differs.
        seed: fixes the noise.
    """

    def __init__(
        self,
        tuned: Adapted,
        prompts: Sequence[str] | None,
        samples: int,
        reward: Reward,
        *,
        judge: Reward | None = None,
        held_out: Mapping[str, Reward] | None = None,
        asked: Sequence[str] | None = None,
        seed: int = 0,
    ) -> None:
        self.tuned, self.samples = tuned, samples
        self.prompts = None if prompts is None else list(prompts)
        self.asked = list(asked or self.prompts or [""])
        self.reward, self.judge, self.held_out = reward, judge, dict(held_out or {})
        p = 1 if prompts is None else len(prompts)
        noise = Noise(seed, range(p), samples, step="panel", dtype=noise_dtype(tuned))
        self.x_0 = noise.normal(tuned.event_shape)
        self._instruments: dict[int, Instruments] = {}
        self.base: dict[int, Tensor] = {}

    @property
    def device(self) -> torch.device:
        """Where the flow is now."""
        return next(iter(self.tuned.parameters())).device

    @torch.no_grad()
    def draw(self, scale: float = 1.0, steps: int = 1) -> Tensor:
        """Draw the pictures (p * n, 3, h, w) by so many composed jumps."""
        flow, n = self.tuned.at(scale), self.samples
        group = max(1, ROWS // n)  # prompts of one call
        names = self.prompts or [""]
        parts = []
        for a in range(0, len(names), group):
            some = names[a : a + group]
            x = self.x_0[a * n : (a + len(some)) * n].to(self.device)
            bound = flow if self.prompts is None else flow.given(some)
            for k in range(steps):
                x = bound.jump(x, k / steps, (k + 1) / steps)
            parts.append(flow.decode(x).float())
        return torch.cat(parts)

    def instruments(self, steps: int = 1) -> Instruments:
        """Return the instruments, built on the base's pictures by so many steps."""
        if steps not in self._instruments:
            for reward in (self.reward, self.judge, *self.held_out.values()):
                if reward is not None:
                    reward.to(self.device)
            self.base[steps] = self.draw(0.0, steps)
            self._instruments[steps] = Instruments(
                self.base[steps], self.asked, self.reward, judge=self.judge, held_out=self.held_out
            )
        return self._instruments[steps]

    def read(
        self, scale: float = 1.0, steps: int = 1, drift: bool = False
    ) -> tuple[Reading, list[Alarm], Tensor]:
        """Draw, and return the reading, its alarms, and the pictures."""
        instruments = self.instruments(steps)
        images = self.draw(scale, steps)
        reading = instruments.read(images, self.drift(scale) if drift else None)
        return reading, instruments.alarms(reading), images

    def drift(self, scale: float = 1.0, prompts: int = 8) -> Drift:
        """Return how far velocity and jump are from the base's, one noise for each prompt."""
        flow, base, x = self.tuned.at(scale), self.tuned.base, self.x_0[:: self.samples][:prompts]
        if self.prompts is None:
            x = self.x_0[:prompts]
        else:
            names = self.prompts[:prompts]
            flow, base = flow.given(names), base.given(names)
        return velocity_distance(flow, base, x.to(self.device))

    def terms(self, images: Tensor) -> dict[str, float]:
        """Return each term's mean score and mean share of the gradient, of a composed reward.

        `term/NAME` is in the term's own units, `gradient/NAME` is the norm of what the term adds
        to the whole reward's gradient with respect to a picture.
        """
        asked = [text for text in self.asked for _ in range(self.samples)]
        scores, gradients = dissect(self.reward, images, asked, ROWS)
        return {f"term/{k}": float(v.mean()) for k, v in scores.items()} | {
            f"gradient/{k}": float(v.mean()) for k, v in gradients.items()
        }

    def sheet(self, images: Tensor, steps: int, shown: int = 8) -> list[Row]:
        """Return the rows of a sheet: the base's pictures of a prompt, the tuned ones below."""
        n = self.samples
        rows: list[Row] = []
        for i, prompt in enumerate((self.prompts or [""])[:shown]):
            part = slice(i * n, (i + 1) * n)
            for whose, pictures in (("base", self.base[steps]), ("tuned", images)):
                scores = self.reward(pictures[part], [self.asked[i]] * n).tolist()
                rows.append((f"{prompt!r} {whose}", pictures[part], [f"{s:.3g}" for s in scores]))
        return rows
