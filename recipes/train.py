"""`steer train`: a velocity by flow matching, then its flow map, both from one command."""

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import torch

from recipes.fitting import begun_alike, divided, fit, module_of, sheet_of
from recipes.sources import Name, Source, source_of
from steer.files import expanded, tidy
from steer.lock import locked
from steer.training.processes import is_first

__all__ = ["train"]


def train(
    out: Path = Path("runs/emoji"),
    data: Name = "emoji",
    folder: Path | None = None,
    stages: list[Literal["velocity", "map", "posterior"]] = ["velocity", "map"],  # noqa: B006
    channels: list[int] = [32, 64, 128],  # noqa: B006
    blocks: list[int] = [1, 2, 2],  # noqa: B006
    width: int = 192,
    batch_size: int = 40,
    velocity_steps: int = 1800,
    map_steps: int = 440,
    posterior_steps: int = 440,
    posterior_rule: str = "psd-m",
    posterior_channels: list[int] | None = None,
    muon: float = 2e-3,
    adamw: float = 1e-3,
    average: float = 0.998,
    map_rate: float = 0.5,
    map_average: float = 0.99,
    rule: str = "heun",
    options: dict[str, Any] = {},  # noqa: B006
    teacher: bool = True,
    pairs: str | None = None,
    weight: str | None = None,
    diagonal: float | None = None,
    distance: Literal["square", "huber"] = "square",
    derivative: Literal["auto", "jvp", "difference"] = "auto",
    guidance: float | list[float] = 3.0,
    empty: float = 0.12,
    recoloured: float = 0.3,
    shift: int = 2,
    start: Path | None = None,
    seed: int = 0,
    save_every: int = 50,
    sheet_every: int = 300,
    precision: str = "auto",
    devices: int = 1,
) -> None:
    """Train a two-time network: its velocity, then the map of the guided velocity.

    An interrupted run resumes from its last checkpoint when it is started again, and gives the
    weights of an uninterrupted run. The finished model is `OUT/map`, for `steer.load`.

    Args:
        out: the run's folder.
        data: training data: emoji, or fashion (Fashion-MNIST).
        folder: folder with the published files of fashion, for example
            /usr/share/datasets/fashion-mnist of Debian's package dataset-fashion-mnist. Default:
            the 2,000 pictures in the package.
        stages: which stages to run: velocity, map, posterior; each starts from the result of the
            previous one in the run's folder.
        channels: channels of each level of the network.
        blocks: residual blocks of each level.
        width: size of the condition vector.
        batch_size: pictures per step.
        velocity_steps: steps of the first stage.
        map_steps: steps of the second stage.
        posterior_steps: steps of the third stage, which trains a posterior map of the map's flow:
            one call gives one sample of `p(x_1 | x_t = x)`. It is saved in the map's folder, for
            `steer.load_posterior`.
        posterior_rule: training rule of the posterior map.
        posterior_channels: channels of its levels. Default: the map's.
        muon: learning rate of the matrices.
        adamw: learning rate of the other parameters.
        average: decay of the running average of the weights.
        map_rate: both learning rates are scaled by this in the second stage.
        map_average: decay of the running average in the second stage.
        rule: training rule of the map, a name that `steer rules` lists.
        options: options of the rule, as '{name: value}'; `velocity` is the velocity that it
            follows: conditional, own or teacher.
        teacher: train the map's diagonal on the frozen, guided velocity of the first stage; else
            continue with flow matching. Rules with a teacher use it in any case.
        pairs: distribution of the times (s, t): ends, triangle, logit-normal, gaps, dyadic,
            to-the-end or half-to-the-end. Default: the rule's own.
        weight: weighting of the errors: uniform, adaptive or learned. Default: the rule's own.
        distance: loss of an error: square; or huber, which keeps uniform areas uniform, if all
            targets come from a teacher.
        diagonal: fraction of a batch with s = t. Default: the rule's own.
        derivative: how the network is differentiated along the flow: jvp (exact), difference
            (central differences), or auto (jvp if the network supports it).
        guidance: scale of classifier-free guidance that is distilled into the map; 1 for none. Two
            numbers, '[1, 6]': the map takes the scale as an input, in this range
            (`flow.guided(3.0)`, `steer sample --cfg 3`).
        empty: fraction of empty prompts.
        recoloured: fraction of pictures that are recoloured, with the new colour in their caption.
        shift: largest random shift of a picture, in pixels.
        start: folder of a trained velocity to start from. Default: from scratch.
        seed: seed of all random numbers.
        save_every: steps between checkpoints.
        sheet_every: steps between sample sheets; 0 for none.
        precision: precision of Lightning; "auto" is bf16-mixed if the hardware has bf16, else
            32-true.
        devices: number of processes, one per device; they divide every batch.
    """
    settings = {
        k: os.fspath(v) if isinstance(v, Path) else v
        for k, v in locals().items()
        if k not in ("out", "stages", "precision")
    }
    from steer.training.rules import build

    divided(batch_size, devices)
    for name, chosen in ((rule, options), (posterior_rule, {})):
        build(name, chosen)  # an unknown one is refused before the first stage
    out = expanded(out)
    first = is_first()
    with locked(out) if first else nullcontext():
        if first:
            tidy(out)
            begun_alike(out, settings)
        for stage in stages:
            _stage(stage, out, settings, precision)


def _stage(stage: str, out: Path, settings: dict[str, Any], precision: str) -> None:
    from steer.models.loading import save
    from steer.models.posterior_unet import save_posterior
    from steer.training.data import Batches

    folder = out / "map" / "posterior" if stage == "posterior" else out / stage
    if all((folder / name).exists() for name in ("model.safetensors", "config.json")):
        print(f"{folder} is finished")
        return
    files = settings["folder"] and Path(settings["folder"])
    source = source_of(settings["data"], settings["recoloured"], settings["shift"], files)
    batches = Batches(
        source.count,
        source.draw,
        settings["batch_size"],
        seed=settings["seed"],
        empty=settings["empty"],
    )
    torch.manual_seed(settings["seed"])
    scale = settings["guidance"] if isinstance(settings["guidance"], float | int) else 3.0
    sheet: Any = sheet_of(folder / "sheets", source.sheet, None if stage == "map" else scale)
    if stage == "velocity":
        flow, rule = _velocity(source, settings)
    elif stage == "map":
        flow, rule = _map(out, settings)
    else:
        flow, rule = _posterior(out, settings)
        sheet = None
    derives = stage != "velocity" and rule.rule.derives
    if not derives:  # forward-mode derivatives need the contiguous layout
        flow.to(memory_format=torch.channels_last)  # a tenth faster on a CPU
    module = module_of(stage, flow, rule, batches, settings)
    every = settings["sheet_every"]
    fit(module, folder, settings["save_every"], precision, every, sheet, settings["devices"])
    if module.global_step >= module.steps and is_first():
        if every and sheet is not None:
            sheet(module.average, module.steps)
        # written last: then the stage is finished
        (save_posterior if stage == "posterior" else save)(module.average, folder)


def _velocity(source: Source, settings: dict[str, Any]) -> tuple[Any, Any]:
    """Return an untrained flow, or that of `start`, and flow matching."""
    from steer.models.loading import load
    from steer.models.two_time import NetworkFlow, TwoTimeUNet
    from steer.training.rules import FlowMatching

    sizes = {k: settings[k] for k in ("channels", "blocks", "width")}
    kind = {"size": source.size, "colours": source.colours}
    flow = NetworkFlow(TwoTimeUNet(source.words, **sizes, **kind))
    if settings["start"] is not None:
        begun: Any = load(settings["start"]).train().requires_grad_(True)
        if begun.network.config != flow.network.config:
            raise ValueError(
                f"the velocity in {settings['start']} has another network or vocabulary than this "
                "run's settings: give the channels, blocks and width that it was trained with"
            )
        flow = begun
    return flow, FlowMatching()


def _map(out: Path, settings: dict[str, Any]) -> tuple[Any, Any]:
    """Return the velocity in the run's folder, to be trained further, and the map's rule."""
    from steer.models.loading import load
    from steer.models.two_time import NetworkFlow, TwoTimeUNet
    from steer.training.rules import MapObjective, build

    flow: Any = load(out / "velocity").train().requires_grad_(True)
    scales = settings["guidance"] if isinstance(settings["guidance"], list) else None
    if scales is not None:
        told = TwoTimeUNet(**{**flow.network.config, "guidance": scales})
        told.load_state_dict(flow.network.state_dict(), strict=False)
        flow = NetworkFlow(told)
    taught = build(settings["rule"], settings["options"])
    rule = MapObjective(
        taught,
        load(out / "velocity") if settings["teacher"] or taught.field == "teacher" else None,
        settings["guidance"] if scales is None else (scales[0], scales[1]),
        pairs=settings["pairs"],
        weight=settings["weight"],
        diagonal=settings["diagonal"],
        distance=settings["distance"],
        derivative=settings["derivative"],
    )
    return flow, rule


def _posterior(out: Path, settings: dict[str, Any]) -> tuple[Any, Any]:
    """Return an untrained posterior map of the size of the run's map, and its objective."""
    from steer.models.loading import load
    from steer.models.posterior import Preconditioned
    from steer.models.posterior_unet import PosteriorUNet
    from steer.path import Linear
    from steer.posterior import PosteriorMap
    from steer.training.posterior import PosteriorObjective
    from steer.training.rules import build

    base: Any = load(out / "map")
    config = {k: v for k, v in base.network.config.items() if k != "guidance"}
    config["channels"] = settings["posterior_channels"] or config["channels"]
    flow = PosteriorMap(Preconditioned(PosteriorUNet(**config), Linear()))
    rule = build(settings["posterior_rule"])
    teacher = base if settings["teacher"] or rule.field == "teacher" else None
    return flow, PosteriorObjective(base.path, teacher, rule)
