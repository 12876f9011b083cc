"""The pictures of checks during a tuning run: fixed prompts, fixed noise, base and tuned."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from steer.adapters.lora import START, Adapted
from steer.flow import FlowMap, composed, device_of
from steer.noise import Noise, noise_dtype
from steer.pictures import Row
from steer.reward import Reward, dissect
from steer.tuning.alarms import Alarm
from steer.tuning.instruments import Instruments
from steer.tuning.reading import Reading
from steer.tuning.request import Tuning
from steer.tuning.statistics import DRIFT_CALLS, Drift, velocity_distance

__all__ = ["Panel", "has_pictures"]

ROWS = 64
"""Rows of one network call when pictures are sampled for a check."""

PROMPTS = 16
"""Number of tuning prompts that are sampled if no others are given."""

DRIFTING = 8
"""Number of rows for the drift."""

SHOWN = 6, 4
"""Prompts of a sheet, and pictures of each, base and tuned: 822 x 810 pixels fit a screen."""


@torch.no_grad()
def has_pictures(flow: FlowMap) -> bool:
    """Return whether the flow decodes to pictures, (n, 3, h, w)."""
    x = torch.zeros(1, *flow.event_shape, device=device_of(flow), dtype=noise_dtype(flow))
    shape = flow.decode(x).shape
    return len(shape) == 4 and shape[1] == 3


class Panel:
    """Fixed prompts and fixed noise, with the base's pictures for each number of steps.

    Args:
        tuned: the flow with its adapters.
        prompts: prompts of the pictures; None for a flow without prompts.
        samples: pictures of each prompt.
        reward: the reward that is tuned for.
        judge: the held-out reward.
        held_out: further rewards that are not tuned for.
        asked: the rewards' prompts, if they differ.
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

    @classmethod
    def of(cls, tuning: Tuning, tuned: Adapted) -> "Panel":
        """Return a run's panel, with the prompts of its settings or the first tuning prompts."""
        check, asked = tuning.settings.check_prompts, tuning.settings.check_prompts
        tuned_on = tuning.prompts
        if check is None and tuned_on.prompts is not None:
            check = tuned_on.prompts[:PROMPTS]
            asked = (tuned_on.asked or tuned_on.prompts)[:PROMPTS]
        return cls(
            tuned, None if tuned_on.prompts is None else check, tuning.settings.check_samples,
            tuning.reward, judge=tuning.judge, held_out=tuning.held_out, asked=asked,
            seed=tuning.seed,
        )  # fmt: skip

    @torch.no_grad()
    def draw(self, scale: float = 1.0, steps: int = 1) -> Tensor:
        """Sample the pictures (p * n, 3, h, w) by `steps` composed jumps."""
        return self._drawn(self.tuned.at(scale), steps)

    def _drawn(self, flow: Adapted, steps: int) -> Tensor:
        n = self.samples
        group = max(1, ROWS // n)  # prompts per call
        names = self.prompts or [""]
        parts = []
        for a in range(0, len(names), group):
            some = names[a : a + group]
            x = self.x_0[a * n : (a + len(some)) * n].to(device_of(flow))
            bound = flow if self.prompts is None else flow.given(some)
            x = composed(bound, x, [k / steps for k in range(steps + 1)])
            parts.append(flow.decode(x).float())
        return torch.cat(parts)

    def instruments(self, steps: int = 1) -> Instruments:
        """Return the instruments, built on the base's pictures with this number of steps."""
        if steps not in self._instruments:
            for reward in (self.reward, self.judge, *self.held_out.values()):
                if reward is not None:
                    reward.to(device_of(self.tuned))
            self.base[steps] = self._drawn(self.tuned.base, steps)
            self._instruments[steps] = Instruments(
                self.base[steps], self.asked, self.reward, judge=self.judge, held_out=self.held_out
            )
        return self._instruments[steps]

    def read(
        self, scale: float = 1.0, steps: int = 1, drift: bool = False
    ) -> tuple[Reading, list[Alarm], Tensor]:
        """Sample, and return the reading, its alarms, and the pictures.

        Base and tuned pictures are scored on the same, current scale, also by a reward that learns
        it.
        """
        instruments = self.instruments(steps)
        instruments.rescore(self.base[steps])
        images = self.draw(scale, steps) if self._moved(scale) else self.base[steps]
        reading = instruments.read(images, self.drift(scale) if drift else None)
        return reading, instruments.alarms(reading), images

    def drift(self, scale: float = 1.0) -> Drift:
        """Return the drift of velocity and jump from the base's, with one start per prompt."""
        if not self._moved(scale):
            return Drift(0.0, 0.0)
        flow, x = self.tuned, self.x_0[:DRIFTING]
        if self.prompts is not None:
            x = self.x_0[:: self.samples][:DRIFTING]
            flow = flow.given(self.prompts[:DRIFTING])
        return velocity_distance(flow.at(scale), flow.base, x.to(device_of(flow)))

    def _moved(self, scale: float) -> bool:
        """Return whether the flow at a scale may differ from the base."""
        return bool(scale) or START in self.tuned.configs

    def cost(self, scales: Sequence[float], steps: Sequence[int]) -> int:
        """Return the network calls for reading each scale at each number of steps, and drift once.

        The base is sampled once for each number of steps.
        """
        tuned = sum(map(self._moved, scales))
        grids = {k: pairwise([i / k for i in range(k + 1)]) for k in steps}
        calls = {k: sum(self.tuned.calls("jump", *each) for each in grids[k]) for k in steps}
        drawn = sum(calls[k] * (tuned + (k not in self.base)) for k in steps)
        rows = len(self.x_0) if self.prompts is None else len(self.prompts)
        drift = DRIFT_CALLS * min(rows, DRIFTING) * tuned if steps else 0
        return len(self.x_0) * drawn + self.tuned.evaluations * drift

    def terms(self, images: Tensor) -> dict[str, float]:
        """Return each term's mean score and mean share of the gradient, of a composed reward.

        `term/NAME` is in the term's own units, `gradient/NAME` is the norm of the term's
        contribution to the whole reward's gradient with respect to a picture.
        """
        asked = [text for text in self.asked for _ in range(self.samples)]
        scores, gradients = dissect(self.reward, images, asked, ROWS)
        return {f"term/{k}": float(v.mean()) for k, v in scores.items()} | {
            f"gradient/{k}": float(v.mean()) for k, v in gradients.items()
        }

    def sheet(self, images: Tensor, steps: int) -> list[Row]:
        """Return the rows of a sheet, one per prompt: the base's pictures, then the tuned ones."""
        prompts, most = SHOWN
        n = min(self.samples, most)
        rows: list[Row] = []
        for i, prompt in enumerate((self.prompts or [""])[:prompts]):
            part = slice(i * self.samples, i * self.samples + n)
            pictures = torch.cat([self.base[steps][part], images[part]])
            scores = self.reward(pictures, [self.asked[i]] * 2 * n).tolist()
            rows.append((f"{prompt!r}: base, then tuned", pictures, [f"{s:.3g}" for s in scores]))
        return rows
