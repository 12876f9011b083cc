"""A model's figures on Fashion-MNIST: classes, law of the pictures, map, posterior map."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

import steer
from recipes.data.fashion import CLASSES, Fashion
from recipes.figures import rate
from recipes.measure import draw, kid
from recipes.sheet import contact_sheet
from recipes.terminal import say
from rewards.judge import Judge
from steer.flow import FlowMap, device_of
from steer.posterior import PosteriorMap
from steer.training.metric import composition_error, lagrangian_residual, nearest_distance

__all__ = ["class_parts", "class_rate", "show_classes"]

STEPS = (1, 2, 4, 8)


def class_rate(judge: Judge, images: Tensor, classes: Tensor) -> dict[str, float]:
    """Return the share of pictures that the judge assigns to their class, with standard error."""
    picked = judge.similarity(images, CLASSES).argmax(1)
    return rate(picked.cpu() == classes)._asdict()


def class_parts(
    flow: FlowMap,
    posterior: PosteriorMap | None,
    fashion: Fashion,
    judge: Judge,
    kernel: int,
    paths: int,
    out: Path,
) -> list[Callable[[], dict[str, Any]]]:
    """Return the parts of the evaluation: name -> function that returns the figures.

    Args:
        flow: the model.
        posterior: its posterior map, if it has one.
        fashion: the data; the model's pictures are compared with the test pictures.
        judge: judge of the ten classes.
        kernel: pictures for the accuracy and the kernel distance, for each number of steps.
        paths: paths for the errors of the maps.
        out: folder for the sheets.
    """
    # the same number of each class as in the test pictures
    classes = fashion.classes[fashion.test].repeat(1 + kernel // len(fashion.test))[:kernel]
    prompts = [CLASSES[k] for k in classes.tolist()]
    test = fashion.images[fashion.test].expand(-1, 3, -1, -1)

    def pictures() -> dict[str, Any]:
        real = judge.features(test)
        first, second = real.chunk(2)
        found: dict[str, Any] = {"class_accuracy": {}, "kernel_distance": {}}
        for k in STEPS:
            images = draw(flow, prompts, k, 0, batch=250)
            found["class_accuracy"][str(k)] = class_rate(judge, images, classes)
            mean, spread = kid(real, judge.features(images))
            found["kernel_distance"][f"{k} steps"] = {"mean": mean, "spread": spread}
            some = torch.stack([x for c in range(10) for x in images[classes == c][:6]])
            names = [CLASSES[c] for c in range(10) for _ in images[classes == c][:6]]
            contact_sheet(some, names, out / f"classes_{k}_step.png")
        found["class_accuracy"]["real"] = class_rate(judge, test, fashion.classes[fashion.test])
        mean, spread = kid(first, second)
        found["kernel_distance"]["real to real"] = {"mean": mean, "spread": spread}
        return found

    def exactness() -> dict[str, Any]:
        bound = flow.given(prompts[:paths])
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(paths, *flow.event_shape, generator=generator).to(device_of(flow))
        return {
            "composition_error": {"0 -> 0.5 -> 1": composition_error(bound, x, 0.0, 0.5, 1.0)},
            "lagrangian_residual": {
                "from 0": {
                    f"{t:g}": lagrangian_residual(bound, x, 0.0, t) for t in (0.5, 0.9, 1.0)
                }
            },
        }

    def nearest() -> dict[str, Any]:
        train = fashion.images[fashion.train]
        some = draw(flow, prompts[:200], 4, 3)[:, :1].cpu()
        return {
            "nearest_training_distance": {
                "prompts": float(nearest_distance(some, train).median()),
                "test pictures": float(
                    nearest_distance(fashion.images[fashion.test][:200], train).median()
                ),
            }
        }

    def posteriors() -> dict[str, Any]:
        return {} if posterior is None else {
            "posterior": _posterior(flow, posterior, test[:paths], prompts[:paths])
        }  # fmt: skip

    return [pictures, exactness, nearest, posteriors]


@torch.no_grad()
def _posterior(
    flow: FlowMap, posterior: PosteriorMap, images: Tensor, prompts: list[str]
) -> dict[str, dict[str, float]]:
    """Compare samples of the posterior with the denoiser and with GLASS, by t.

    "mean": root mean square distance of the mean of 16 samples to the denoiser, divided by the
    standard deviation of a sample; exact samples give 1/4. "spread": standard deviation of the
    samples divided by that of GLASS's samples.
    """
    found = {}
    generator = torch.Generator().manual_seed(2)
    for t in (0.0, 0.25, 0.5, 0.75):
        x_1 = flow.encode(images)
        x = flow.path.interpolate(
            torch.randn(x_1.shape, generator=generator), x_1, torch.full((len(x_1),), t)
        )
        bound = flow.given(prompts)
        y = posterior.given(prompts).sample(x, t, 16, generator)
        # all 16 samples of a state are in one batch, prompt-major
        z = steer.Glass(bound, 16).sample(x, t, 16, generator)
        spread, other = ((d - d.mean(0)).square().mean().sqrt() for d in (y, z))
        miss = (y.mean(0) - bound.denoise(x, t)).square().mean().sqrt()
        found[f"{t:g}"] = {"mean": float(miss / other), "spread": float(spread / other)}
    return found


def show_classes(metrics: dict[str, Any]) -> None:
    """Print the figures as a table."""
    table = Table("figure", "at", "value", title=f"model {metrics['model']}")
    for at, share in metrics["class_accuracy"].items():
        table.add_row("class accuracy", at, f"{share['mean']:.3f} ± {share['error']:.3f}")
    for at, value in metrics["kernel_distance"].items():
        table.add_row("kernel distance (KID)", at, f"{value['mean']:.4f} ({value['spread']:.4f})")
    for at, value in metrics["composition_error"].items():
        table.add_row("composition error", at, f"{value:.3f}")
    for at, value in metrics["lagrangian_residual"]["from 0"].items():
        table.add_row("Lagrangian residual", f"from 0 at {at}", f"{value:.3f}")
    for at, value in metrics["nearest_training_distance"].items():
        table.add_row("nearest training picture", at, f"{value:.3f}")
    for at, two in metrics.get("posterior", {}).items():
        table.add_row("posterior, mean", f"t = {at}", f"{two['mean']:.3f}")
        table.add_row("posterior, spread", f"t = {at}", f"{two['spread']:.3f}")
    say(table)
