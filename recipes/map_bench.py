"""Benchmarks for training rules: laws in the plane, or Fashion-MNIST."""

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from recipes.data.points import POINTS
from steer.training.map_metric import jacobian_error, lookahead_error, samples, sliced_w2

__all__ = ["DATA", "DISTANCE", "ERROR", "STEPS", "TIMES", "Bench", "FashionBench", "PointsBench"]

STEPS, TIMES, SIZE = (1, 2, 4, 8), (0.0, 0.25, 0.5, 0.75), 4000
DISTANCE = "SW2, {} step"
KERNEL, ACCURACY = "KID, {} step", "classes, {} step"
ERROR = "lookahead, t = {:g}"

DATA = (*POINTS, "fashion")


class Bench(Protocol):
    """A data set, a network for it, and the measurements of a map.

    Attributes:
        distance: name of the figure that is plotted against the steps, with "{}" for their number.
        axis: its axis label.
    """

    distance: str
    axis: str

    def flow(self) -> Any:
        """Return an untrained two-time flow."""

    def batch(self, n: int, generator: torch.Generator) -> tuple[Tensor, list[str]]:
        """Return x_1 and captions of n samples."""

    def measured(self, flow: Any, seed: int) -> dict[str, float]:
        """Return name -> figure."""

    def note(self, rows: list[Mapping[str, Any]]) -> str:
        """Return a note for the readers of the table."""


class PointsBench:
    """A law in the plane whose velocity is known, and a small MLP.

    Args:
        settings: data, width and depth.
    """

    distance, axis = DISTANCE, "sliced W2 to the data"

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.law, self.settings = POINTS[settings["data"]](), settings

    def flow(self) -> Any:
        """Return an untrained two-time MLP."""
        from steer.models.two_time_mlp import TwoTimeMLP

        return TwoTimeMLP(width=self.settings["width"], depth=self.settings["depth"])

    def batch(self, n: int, generator: torch.Generator) -> tuple[Tensor, list[str]]:
        """Return n points, and empty captions."""
        return self.law.sample(n, generator).float(), [""] * n

    def measured(self, flow: Any, seed: int) -> dict[str, float]:
        """Return distances by steps, lookahead errors by t, and the Jacobian's error."""
        law = self.law
        generator = torch.Generator().manual_seed(77 + seed)
        real = law.sample(SIZE, generator)
        noise = torch.randn(SIZE, 2, generator=generator, dtype=torch.float64)
        found = {"floor": sliced_w2(law.sample(SIZE, generator), real, generator)}
        for n in STEPS:
            x = samples(flow, noise.float(), n)
            found[DISTANCE.format(n)] = sliced_w2(x, real, generator)
            if hasattr(law, "inside"):
                found[f"outside, {n} step"] = 1 - float(law.inside(x).float().mean())
        for t in TIMES:
            ours, denoiser = lookahead_error(flow, law, noise[:500], t)
            found[ERROR.format(t)], found[f"denoiser, t = {t:g}"] = ours, denoiser
        found["jacobian, t = 0.5"] = jacobian_error(flow, law, noise[:200], 0.5)
        return found

    def note(self, rows: list[Mapping[str, Any]]) -> str:
        """Return a note with the lower bound of the distance."""
        floor = sum(r["floor"] for r in rows) / len(rows)
        return (
            f"SW2 of two independent samples of the data: {floor:.3f}. Lookaheads: root mean "
            "square distance to the true flow's end."
        )


class FashionBench:
    """Fashion-MNIST and a small U-Net; the judge of the package classifies the pictures.

    The lookahead is compared with the end of the velocity's own ODE, 32 Heun steps.

    Args:
        settings: folder (of the published files, or None), guidance.
    """

    distance, axis = KERNEL, "kernel distance (KID) to the data"

    def __init__(self, settings: Mapping[str, Any]) -> None:
        from recipes.sources import source_of

        folder = settings["folder"] and Path(settings["folder"])
        self.source, self.guidance = source_of("fashion", folder=folder), settings["guidance"]
        self.teacher: Any = None

    def flow(self) -> Any:
        """Return an untrained U-Net's flow, of the size of the package's model."""
        from steer.models.two_time import NetworkFlow, TwoTimeUNet

        source = self.source
        sizes = {"channels": (32, 64, 96), "blocks": (1, 1, 1), "width": 128}
        kind = {"size": source.size, "colours": source.colours}
        return NetworkFlow(TwoTimeUNet(source.words, **sizes, **kind))

    def batch(self, n: int, generator: torch.Generator) -> tuple[Tensor, list[str]]:
        """Return n pictures in [-1, 1] and their captions, of which a tenth are empty."""
        index = torch.randint(self.source.count, (n,), generator=generator).tolist()
        drawn = [self.source.draw(i, generator) for i in index]
        empty = torch.rand(n, generator=generator) < 0.1
        captions = ["" if e else c for e, (_, c) in zip(empty.tolist(), drawn, strict=True)]
        return torch.stack([x for x, _ in drawn]), captions

    def measured(self, flow: Any, seed: int) -> dict[str, float]:
        """Return accuracy and kernel distance by steps, lookahead errors by t."""
        from recipes.data.fashion import CLASSES, load
        from recipes.defaults import own
        from recipes.evaluate_classes import class_rate
        from recipes.measure import draw, kid
        from rewards.judge import Judge
        from steer.training.metric import grain

        fashion, judge = load(), Judge(own("fashion").judge)
        classes = fashion.classes[fashion.test][:500]
        prompts = [CLASSES[k] for k in classes.tolist()]
        real = judge.features(fashion.images[fashion.test].expand(-1, 3, -1, -1))
        found: dict[str, float] = {}
        for n in STEPS:
            images = draw(flow, prompts, n, 77 + seed, batch=250)
            found[KERNEL.format(n)] = kid(real, judge.features(images))[0]
            found[ACCURACY.format(n)] = class_rate(judge, images, classes)["mean"]
            if n == 1:
                found["grain, 1 step"] = grain(images)
        found |= self._lookaheads(flow, prompts[:100], seed)
        return found

    @torch.no_grad()
    def _lookaheads(self, flow: Any, prompts: list[str], seed: int) -> dict[str, float]:
        """Return the RMS errors of lookahead and denoiser against the teacher's ODE."""
        from steer.training.rules import guided_velocity

        if self.teacher is None:
            return {}
        b = guided_velocity(self.teacher, prompts, self.guidance)
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(len(prompts), *flow.event_shape, generator=generator)
        times = torch.linspace(0, 1, 33).tolist()
        states, bound, found = [x], flow.given(prompts), {}
        for s, t in pairwise(times):
            first = b(x, torch.full((len(x),), s))
            second = b(x + (t - s) * first, torch.full((len(x),), t))
            x = x + (t - s) / 2 * (first + second)
            states.append(x)
        for t in TIMES:
            here = states[round(32 * t)]
            found[ERROR.format(t)] = float((bound.jump(here, t, 1.0) - x).square().mean().sqrt())
            d = here + (1 - t) * b(here, torch.full((len(x),), t))
            found[f"denoiser, t = {t:g}"] = float((d - x).square().mean().sqrt())
        return found

    def note(self, rows: list[Mapping[str, Any]]) -> str:
        """Return a note that explains the columns."""
        return (
            "500 pictures a step count. Classes: the fraction that the judge assigns to the class "
            "of their prompt. Lookaheads: root mean square distance, in pictures of [-1, 1], to "
            "the end of the guided velocity's ODE."
        )
