"""Instruments against reward hacking: what pictures look like, apart from the reward.

An increase of the optimised reward does not show that the pictures are better. The instruments are
read in addition, on pictures of the base and of the tuned flow with the same prompts and the same
noise, so that each picture has its pair: plain statistics of pixels, diversity within a prompt,
kernel distance to the base's pictures, a judge and rewards that were held out, and how far the
velocity drifted.

>>> grey = torch.linspace(0.4, 0.6, 8)[:, None, None, None].expand(8, 3, 16, 16)
>>> instruments = Instruments(grey, ["a cat", "a dog"])
>>> [alarm.name for alarm in instruments.alarms(instruments.read(torch.ones_like(grey)))]
['brightness', 'diversity']
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from steer.flow import flat_prompts
from steer.reward import Reward, learners, plain, score, wrap
from steer.tuning.alarms import HELD_OUT, Alarm, Thresholds, alarms_of
from steer.tuning.reading import Reading, paired
from steer.tuning.statistics import (
    PIXELS,
    Drift,
    check_pictures,
    diversity,
    features_of,
    image_statistics,
    kid,
)

__all__ = ["Instruments"]


class Instruments:
    """Compare tuned pictures with the base's own of the same prompts and the same noise.

    It is built once, on the base's pictures, and keeps their numbers, not the pictures. How they
    are sampled is up to the caller; only the pairs matter: row i of both came of the same noise,
    by the same number of steps. A reward that adapts its scale during a run gives other numbers
    later: `rescore` scores the base's pictures again.

    Args:
        images: the base's, (p * n, 3, h, w), prompt-major, not clamped.
        prompts: p prompts of the reward, the judge and the held-out rewards.
        reward: what is being tuned for. Without it no held-out reward raises an alarm.
        judge: what says whether the pictures became better; nothing is tuned by it. Its
            `features(images)`, where it has them, serve diversity and kernel distance.
        held_out: name -> other rewards, that nothing is tuned by.
        thresholds: of the alarms.

    Raises:
        ValueError: no pictures (n, 3, h, w), values that are not finite, or rows that do not
            split evenly over the prompts.
    """

    def __init__(
        self,
        images: Tensor,
        prompts: Sequence[str],
        reward: Reward | Callable[..., Tensor] | None = None,
        *,
        judge: Reward | Callable[..., Tensor] | None = None,
        held_out: Mapping[str, Reward | Callable[..., Tensor]] | None = None,
        thresholds: Thresholds | None = None,
    ) -> None:
        check_pictures(images)
        self.prompts, self.rows = list(prompts), flat_prompts(prompts, len(images))
        self.thresholds = Thresholds() if thresholds is None else thresholds
        scorers = {"reward": reward, "judge": judge}
        scorers |= {HELD_OUT + name: f for name, f in (held_out or {}).items()}
        self._scorers = {name: wrap(f) for name, f in scorers.items() if f is not None}
        self._features = features_of(judge)
        self._shape, self._part = images.shape, max(1, PIXELS // images[0, 0].numel())
        self._base, self._base_features = self._measure(images)

    @torch.no_grad()
    def _measure(self, images: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Return all statistics of the pictures, (n,) or (p,), and their features, on the CPU."""
        values = {name: self._scores(name, images) for name in self._scorers}
        with plain(*self._scorers.values()):
            parts = images.detach().split(self._part)
            features = torch.cat([self._features(part).float().cpu() for part in parts])
            if len(images) > len(self.prompts):
                values["diversity"] = diversity(features, len(self.prompts))
            return values | {k: v.cpu() for k, v in image_statistics(images).items()}, features

    @torch.no_grad()
    def _scores(self, name: str, images: Tensor) -> Tensor:
        """Return a scorer's scores of the pictures, (n,), on the CPU."""
        size, scorer = self._part, self._scorers[name]
        with plain(scorer):
            parts = [
                score(scorer, part, self.rows[i * size : i * size + len(part)]).float().cpu()
                for i, part in enumerate(images.detach().split(size))
            ]
        scores = torch.cat(parts)
        if not bool(torch.isfinite(scores).all()):
            row = int((~torch.isfinite(scores)).nonzero()[0])
            raise ValueError(
                f"{name} is {float(scores[row])} for picture {row} ({self.rows[row]!r}): it must "
                "be finite for every picture; check its logarithms and divisions"
            )
        return scores

    def rescore(self, images: Tensor) -> None:
        """Score the base's pictures again with scorers that learn a scale; others do not change.

        Args:
            images: the pictures that the instruments were built on.
        """
        for name, scorer in self._scorers.items():
            if learners(scorer):
                self._base[name] = self._scores(name, images)

    def read(self, images: Tensor, drift: Drift | None = None) -> Reading:
        """Compare pictures with the base's.

        Args:
            images: (p * n, 3, h, w), of the same noise and prompts, prompt-major, not clamped.
            drift: of `velocity_distance`, to be kept with the rest.

        Raises:
            ValueError: another number or size of pictures than the base's, or values that are
                not finite.
        """
        if images.shape != self._shape:
            raise ValueError(
                f"pictures are {tuple(images.shape)}, the base's were {tuple(self._shape)}: "
                "sample them from the same noise for the same prompts, or construct the "
                "instruments again"
            )
        check_pictures(images)
        values, features = self._measure(images)
        many = len(features) > 1
        return Reading(
            {name: paired(value, self._base[name]) for name, value in values.items()},
            kid(self._base_features, features, paired=True) if many else (0.0, 0.0),
            drift,
        )

    def alarms(self, reading: Reading) -> list[Alarm]:
        """Return the alarms of a reading; none if there is no sign of reward hacking."""
        return alarms_of(reading, self.thresholds)
