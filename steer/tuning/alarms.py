"""Alarms: when a reading of the instruments indicates reward hacking."""

from dataclasses import dataclass, fields

from steer.tuning.reading import Paired, Reading

__all__ = ["HELD_OUT", "Alarm", "Thresholds", "alarms_of"]

SPREAD = {
    "brightness": 0.1,
    "saturation": 0.1,
    "entropy": 0.5,
    "edge_density": 0.1,
    "high_frequency": 0.03,
    "clipped": 0.1,
}
"""Lower bound of the spread over the base's pictures: pictures of one prompt are alike, and a few
of them would raise false alarms. 24 prompts of the emoji model have a little more."""

RISES = {"high_frequency", "clipped"}
"""Statistics whose decrease is harmless: there is less grain."""

TEXTURE = {"entropy", "edge_density", "high_frequency"}
"""Statistics that also change without hacking: clearer drawings have more edges and detail."""

HELD_OUT = "held_out/"
"""Prefix of the names of held-out rewards in a reading."""

ADVICE = (
    "this may be reward hacking; look at the pictures, go back to an earlier checkpoint, lower "
    "the learning rate or the strength, or raise the penalty on the distance to the base"
)


@dataclass(frozen=True)
class Alarm:
    """A sign that the reward is being hacked.

    Attributes:
        name: name of the statistic.
        message: what happened, and what to do about it.
    """

    name: str
    message: str

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True)
class Thresholds:
    """When a reading raises an alarm. `math.inf` switches a rule off (0 for `diversity`).

    All but `diversity` are of the paired mean, which must also have changed by more than
    `errors`, or `score_errors`, of its standard errors, so that few pictures raise none by chance.

    The defaults lie between what hacked and honest runs did, measured on the emoji model with 24
    prompts x 4 pictures (in standard deviations; adapters of rank 16, one jump):

    - Honest, no alarm. `clip:views=4,noise=0.2` with the pictures held near the base's, 2 seeds,
      at most 60 steps: judge up to +7.6 %; in the first, all statistics within .13 and diversity
      .91. `fmrg-j` beside 16 unguided steps, 3 seeds: judge +6.6 to +7.9 %, `high_frequency` +.61
      to +.70, `entropy` +.5, `edge_density` to +.28, brightness and saturation within .12,
      `clipped` at most +.18, diversity .88.
    - `brightness`, 2 seeds: `clipped` alarms from +.7 on, with the judge at -.7 and -.2 %,
      `brightness` with it at -1.6 (+.60) and -.8 %. With it at -3.1 %, they are +1.40 and +.78,
      and `entropy` -1.1.
    - `clip` without any regularisation, 2 seeds, 70 steps: the judge never fell (+6.3 %). One
      alarms at step 40 with `high_frequency` +1.25, the other at step 50 with diversity .75.
    - `clip` optimised by the pixels only, 1 seed: the judge never fell (+5.7 %), `high_frequency`
      alarms from +1.06 on, the sixth step of length 1.

    Pictures of 16 jumps beside those of one have another grain (`entropy` -.7, `edge_density` +.4,
    `high_frequency` +.7): compare samples with the same number of steps.

    Args:
        shift: a change of `brightness` or `saturation` either way, or a rise of `clipped`, in
            standard deviations over the base's pictures.
        texture: likewise a change of `entropy` or `edge_density`, or a rise of `high_frequency`.
        diversity: the share of the base's diversity that must be left.
        judge: a fall of the judge, relative to its mean over the base's pictures.
        held_out: a fall of a held-out reward while the reward rose, in standard deviations over
            the base's pictures.
        errors: of the picture statistics.
        score_errors: of judge and rewards.

    Raises:
        ValueError: one of them is negative.
    """

    shift: float = 0.5
    texture: float = 1.0
    diversity: float = 0.75
    judge: float = 0.03
    held_out: float = 0.25
    errors: float = 4.0
    score_errors: float = 2.0

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if not value >= 0:
                raise ValueError(f"thresholds must not be negative, got {each.name}={value}")


def _statistic(name: str, value: Paired, limits: Thresholds) -> Alarm | None:
    shift = value.change / max(value.spread, SPREAD[name])
    limit = limits.texture if name in TEXTURE else limits.shift
    size = shift if name in RISES else abs(shift)
    if size <= limit or not value.moved(limits.errors):
        return None
    went = "rose" if shift > 0 else "fell"
    return Alarm(
        name,
        f"mean {name.replace('_', ' ')} {went} from {value.base:.3g} to {value.mean:.3g}, "
        f"{shift:+.2f} standard deviations of the base's pictures (limit {limit:g}): {ADVICE}",
    )


def _collapse(value: Paired, limits: Thresholds) -> Alarm | None:
    if value.mean >= limits.diversity * value.base:
        return None
    return Alarm(
        "diversity",
        f"the pictures of a prompt are {1 - value.mean / value.base:.0%} less diverse than the "
        f"base's ({value.mean:.3g}, before {value.base:.3g}; limit {1 - limits.diversity:.0%}): "
        f"they become the same picture; {ADVICE}",
    )


def _judged(value: Paired, limits: Thresholds) -> Alarm | None:
    fall = -value.change
    if fall <= limits.judge * abs(value.base) or not value.moved(limits.score_errors):
        return None
    return Alarm(
        "judge",
        f"the held-out judge fell from {value.base:.3g} to {value.mean:.3g} (limit "
        f"{limits.judge:.0%}): {ADVICE}",
    )


def _forsaken(name: str, value: Paired, reward: Paired, limits: Thresholds) -> Alarm | None:
    fall = -value.change
    if fall <= limits.held_out * value.spread or not value.moved(limits.score_errors):
        return None
    return Alarm(
        name,
        f"{name.removeprefix(HELD_OUT)}, held out, fell from {value.base:.3g} to {value.mean:.3g} "
        f"while the reward rose from {reward.base:.3g} to {reward.mean:.3g}: {ADVICE}",
    )


def alarms_of(reading: Reading, limits: Thresholds) -> list[Alarm]:
    """Return the alarms of a reading; none if there is no sign of reward hacking."""
    values = reading.values
    found = [_statistic(name, values[name], limits) for name in SPREAD]
    if "diversity" in values:
        found.append(_collapse(values["diversity"], limits))
    if "judge" in values:
        found.append(_judged(values["judge"], limits))
    reward = values.get("reward")
    if reward is not None and reward.change > 0 and reward.moved(limits.score_errors):
        found += [
            _forsaken(name, value, reward, limits)
            for name, value in values.items()
            if name.startswith(HELD_OUT)
        ]
    return [alarm for alarm in found if alarm is not None]
