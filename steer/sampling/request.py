"""`Request`: the arguments of `steer.sample`, checked once, before any work."""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from steer.doors import as_flow, as_reward
from steer.flow import FlowMap, device_of
from steer.guidance.population import check_times
from steer.names import unknown
from steer.noise import noise_dtype, whole
from steer.pictures import as_images
from steer.ranges import count, finite
from steer.reward import Reward, plain, refuse_inference
from steer.sampling.forecast import affordable
from steer.sampling.methods import (
    TABLE,
    AnyMethod,
    Method,
    check_options,
    default_method,
    method_of,
)

__all__ = ["INVERSION", "PROBES", "STARTS", "Request"]

INVERSION = 16
"""Steps of an inversion, two velocities each."""

BAD = ("stop", "drop")
"""The effect of a reward that is not finite: end the run, or give its particle weight zero."""

STARTS = ("noise", "inversion")
"""How a run starts from a picture: with added noise, or by inverting the flow's ODE."""

PROBES = 32
"""Number of one-jump samples that set a prompt's temperature."""


@dataclass(frozen=True)
class Request:
    """One call of `steer.sample`; see there for the arguments.

    Raises:
        ValueError: what `steer.sample` documents; the message says how to fix it.
    """

    flow: FlowMap
    reward: Reward
    prompts: Sequence[str] | str | None = None
    particles: int = 8
    steps: int = 16
    method: AnyMethod | None = None
    temperature: float | None = None
    strength: float | None = None
    seed: int = 0
    reward_prompts: Sequence[str] | str | None = None
    init_image: Tensor | Image.Image | Sequence[Image.Image] | None = None
    init_time: float | None = None
    init_by: Literal["noise", "inversion"] = "noise"
    on_bad_reward: Literal["stop", "drop"] = "stop"
    target: float | None = None
    budget: float | None = None
    batch_size: int | None = None
    position: int = 0
    times: Sequence[float] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "flow", as_flow(self.flow))
        object.__setattr__(self, "reward", as_reward(self.reward, self.device))
        object.__setattr__(self, "seed", whole(self.seed))
        with plain(self.flow), torch.no_grad():  # independent of the caller's state of torch
            self._check()

    def _check(self) -> None:
        self._check_texts()
        check_options(self.chosen, self.options)
        self._check_numbers()
        self._check_start()
        self._check_method()
        build, options = self.chosen.build, self.options
        build(self.flow, self.reward, self.asked, 1.0, self.grid, **options)  # checks the numbers
        self.most_steps  # noqa: B018  a budget that is too small is refused

    @cached_property
    def chosen(self) -> Method:
        """The method."""
        if self.method is not None:
            return method_of(self.method)
        gradient = self.reward.differentiable and "gradient" not in self.flow.lacks
        tilted = self.temperature is not None or self.strength is not None
        return method_of(default_method(gradient, tilted))

    @property
    def listed(self) -> bool:
        """Whether results have a prompt axis: only if prompts were given as a list."""
        return self.prompts is not None and not isinstance(self.prompts, str)

    @property
    def names(self) -> list[str] | None:
        """The prompts as a list, None without prompts."""
        return [self.prompts] if isinstance(self.prompts, str) else self._list(self.prompts)

    @property
    def count(self) -> int:
        """p, the number of prompts; 1 without prompts."""
        return 1 if self.names is None else len(self.names)

    @property
    def asked(self) -> list[str] | None:
        """The reward's prompts, one for each prompt."""
        given = self.reward_prompts
        if given is None:
            return self.names
        return [given] * self.count if isinstance(given, str) else list(given)

    @property
    def start(self) -> float:
        """Where the run begins: 0 is pure noise."""
        if self.init_image is None:
            return 0.0
        return 0.5 if self.init_time is None else float(self.init_time)

    @property
    def grid(self) -> list[float]:
        """The times of the run: as given, else the model's own."""
        if self.times is not None:
            return [float(t) for t in self.times]
        return self.flow.times(self.steps, self.start)

    @property
    def rows(self) -> int:
        """The maximum number of rows of one network call."""
        if self.batch_size is not None:
            return self.batch_size
        return 64 if any(True for _ in self.flow.parameters()) else self.count * self.particles

    @cached_property
    def most_steps(self) -> int | None:
        """The number of steps after which the budget ends the run; None: it does not."""
        if self.budget is None:
            return None
        return affordable(
            self.chosen, self.steps, self.budget, self.reward.differentiable, self.start,
            flow=self.flow, times=self.grid, **self.options,
        )  # fmt: skip

    @property
    def groups(self) -> list[range]:
        """Groups of indices of prompts that are sampled together."""
        size = max(1, self.rows // self.particles)
        if self.target is not None:  # each prompt stops on its own
            size = 1
        return [range(a, min(a + size, self.count)) for a in range(0, self.count, size)]

    @property
    def device(self) -> torch.device:
        """The device of the flow."""
        return device_of(self.flow)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the noise."""
        return noise_dtype(self.flow)

    @cached_property
    def encoded(self) -> Tensor | None:
        """The x of the init image, or of one for each prompt, (1 or p, *event).

        Raises:
            ValueError: a picture out of range, of a wrong number or of a shape that does not fit.
        """
        if self.init_image is None:
            return None
        image = as_images(self.init_image)
        images = image[None] if image.ndim == 3 else image
        inside = images.is_floating_point() and bool(((images >= 0) & (images <= 1)).all())
        if not inside:  # NaN too
            raise ValueError(
                f"an init image of {images.dtype} from {float(images.min()):g} to "
                f"{float(images.max()):g}: pictures are floats in [0, 1], so divide bytes by 255"
            )
        if len(images) not in {1, self.count}:
            raise ValueError(
                f"{len(images)} init images for {self.count} prompts: give one, or one each"
            )
        x = self.flow.encode(images.to(device_of(self.flow)))
        if tuple(x.shape[1:]) != tuple(self.flow.event_shape):
            raise ValueError(
                f"an init image of shape {tuple(images.shape[1:])}, which the model takes for x "
                f"of shape {tuple(x.shape[1:])}: it wants {tuple(self.flow.event_shape)}, so "
                "resize the image"
            )
        return x

    @staticmethod
    def _list(prompts: Sequence[str] | None) -> list[str] | None:
        return None if prompts is None else list(prompts)

    def _check_texts(self) -> None:
        for name, given in (("prompts", self.prompts), ("reward_prompts", self.reward_prompts)):
            if given is None or isinstance(given, str):
                continue
            listed = isinstance(given, Iterable) and not isinstance(
                given, Iterator | Mapping | Set
            )
            if not listed or not all(isinstance(text, str) for text in given):
                raise TypeError(
                    f"{name} must be a string or a list of strings, got {given!r:.60}; None for "
                    "none"
                )

    def _check_numbers(self) -> None:
        if self.listed and not self.prompts:
            raise ValueError(
                "the list of prompts is empty: give at least one, or None for no prompt"
            )
        if self.asked is not None and len(self.asked) != self.count:
            raise ValueError(
                f"{len(self.asked)} reward_prompts for {self.count} prompts: give one for each, "
                "or one"
            )
        size = 1 if self.batch_size is None else self.batch_size
        counts = {"particles": self.particles, "steps": self.steps, "batch_size": size}
        for name, value in counts.items():
            count(name, value)
        if self.temperature is not None and self.strength is not None:
            raise ValueError(
                "temperature and strength both given: strength computes the temperature from the "
                "reward's standard deviation, so give one of them"
            )
        for name, number in (("temperature", self.temperature), ("strength", self.strength)):
            if number is not None and not (number > 0 and math.isfinite(number)):
                raise ValueError(f"{name} must be a number above zero, got {number}")

    def _check_start(self) -> None:
        if self.init_image is None and self.init_time is not None:
            raise ValueError(
                "init_time is the time of a start from a picture: give init_image as well"
            )
        if self.init_by not in STARTS:
            raise unknown("value of init_by", str(self.init_by), STARTS)
        if self.init_by != "noise" and self.init_image is None:
            raise ValueError("init_by is for a start from a picture: give init_image as well")
        if self.init_by == "inversion" and "velocity" in self.flow.lacks:
            raise ValueError(
                f"inversion takes the model's velocity, and {self.flow.lacks['velocity']}: leave "
                "init_by out"
            )
        if self.init_time is not None and not 0 <= self.init_time < 1:
            raise ValueError(
                f"init_time must be in [0, 1) (0 noise, 1 data), got {self.init_time}"
            )
        if self.init_image is not None and "encode" in self.flow.lacks:
            raise ValueError(
                f"this model cannot start from a picture: {self.flow.lacks['encode']}"
            )
        if self.init_image is not None and self.chosen.from_noise:
            raise ValueError(
                f"method {self.chosen.name!r} begins with pure noise and cannot start from a "
                f"picture: use one of {_those(lambda m: not m.from_noise)}"
            )
        check_times(self.grid)
        if abs(self.grid[0] - self.start) > 1e-9 or self.grid[-1] != 1:
            raise ValueError(
                f"times from {self.grid[0]:g} to {self.grid[-1]:g}: this run begins at "
                f"{self.start:g} and ends at 1"
            )
        self.encoded  # noqa: B018  a picture that does not fit is refused

    def _check_method(self) -> None:
        chosen = self.chosen
        if self.on_bad_reward not in BAD:
            raise unknown("value of on_bad_reward", str(self.on_bad_reward), BAD)
        if self.target is not None and not chosen.steers:
            raise ValueError(
                f"method {chosen.name!r} does not evaluate the reward during the run, so it "
                "cannot stop at a target: use a guided method"
            )
        if self.target is not None and not math.isfinite(self.target):
            raise ValueError(f"target must be a finite reward, got {self.target}")
        if self.budget is not None:
            finite("budget", self.budget)
        if chosen.steers and not chosen.tempered and (self.temperature or self.strength):
            raise ValueError(
                f"method {chosen.name!r} has no temperature: it maximises the reward, as strongly "
                f"as its own options say ({', '.join(chosen.options)}); leave temperature and "
                f"strength out, or take one of {_those(lambda m: m.tempered)}"
            )
        if chosen.gradient and "gradient" in self.flow.lacks:
            raise ValueError(
                f"method {chosen.name!r} needs a gradient through the model: "
                f"{self.flow.lacks['gradient']}; or take one of "
                f"{_those(lambda m: not m.gradient)}, which need none"
            )
        if chosen.asks_velocity and "velocity" in self.flow.lacks:
            warnings.warn(
                f"method {chosen.name!r} takes the model's velocity, and "
                f"{self.flow.lacks['velocity']}; or take one of "
                f"{_those(lambda m: not m.asks_velocity and m.steers)}, which use only jumps",
                stacklevel=6,
            )
        if chosen.gradient and not self.reward.differentiable:
            raise ValueError(
                f"method {chosen.name!r} needs the reward's gradient, and the reward is declared "
                f"not differentiable: use one of {_those(lambda m: not m.gradient)}, or a "
                "differentiable reward"
            )
        if chosen.gradient or (chosen.steers and self.reward.differentiable):
            refuse_inference("model", self.flow)
            refuse_inference("reward", self.reward)


def _those(condition: Callable[[Method], bool]) -> str:
    """Name the methods that satisfy a condition."""
    return ", ".join(name for name, method in TABLE.items() if condition(method))
