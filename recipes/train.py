"""`steer train`: a velocity by flow matching, then its flow map, both from one command."""

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import torch

from recipes.fitting import begun_alike, fit, module_of, sheet_of
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

    A run that stopped goes on from its last checkpoint when it is started again, and ends with
    the weights that it would have had. The finished model is `OUT/map`, for `steer.load`.

    Args:
        out: the run's folder.
        data: what to draw: emoji, or fashion (Fashion-MNIST).
        folder: the published files of fashion, as Debian's package dataset-fashion-mnist puts them
            in /usr/share/datasets/fashion-mnist. Default: the 2,000 pictures that come along.
        stages: which stages to run: velocity, map, posterior; each takes what the one before has
            left in the run's folder.
        channels: channels of each level of the network.
        blocks: residual blocks of each level.
        width: size of the condition vector.
        batch_size: pictures a step.
        velocity_steps: length of the first stage.
        map_steps: length of the second.
        posterior_steps: length of the third, a posterior map of the map's flow: one call is one
            draw of `p(x_1 | x_t = x)`. It lies in the map's folder, for `steer.load_posterior`.
        posterior_rule: how the posterior map is learned.
        posterior_channels: channels of its levels. Default: the map's.
        muon: learning rate of the matrices.
        adamw: learning rate of the other parameters.
        average: decay of the running average of the weights.
        map_rate: both learning rates are scaled by this in the second stage.
        map_average: decay of the running average in the second stage.
        rule: how the map is learned, a name that `steer rules` lists.
        options: the rule's own, as '{name: value}'; `velocity` says which velocity it follows:
            conditional, own or teacher.
        teacher: whether the map's diagonal follows the frozen velocity of the first stage, guided;
            else it goes on by flow matching. Rules that follow a teacher have it anyway.
        pairs: law of the times (s, t): ends, triangle, logit-normal, gaps, dyadic, to-the-end or
            half-to-the-end. Default: the rule's own.
        weight: of the errors: uniform, adaptive or learned. Default: the rule's own.
        distance: of an error: square; huber, which keeps flat places flat, where all targets come
            from a teacher.
        diagonal: share of a batch that is at s = t. Default: the rule's own.
        derivative: of the network along the flow: jvp, exact; difference, central; auto: the
            first where the network can do it.
        guidance: scale of classifier-free guidance that the map has built in; 1 for none. Two
            numbers, '[1, 6]': the map takes the scale as an input, within them
            (`flow.guided(3.0)`, `steer sample --cfg 3`).
        empty: share of empty prompts.
        recoloured: share of pictures that are turned to another colour, which their caption names.
        shift: largest random shift of a picture, in pixels.
        start: a trained velocity to begin with, a folder. Default: from scratch.
        seed: fixes everything that is drawn.
        save_every: steps between checkpoints.
        sheet_every: steps between sample sheets; 0 for none.
        precision: Lightning's; "auto" is bf16-mixed where the hardware has bf16, else 32-true.
        devices: processes, one a device; each takes its share of every batch.
    """
    settings = {
        k: os.fspath(v) if isinstance(v, Path) else v
        for k, v in locals().items()
        if k not in ("out", "stages", "precision")
    }
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
    if not derives:  # forward derivatives need the plain layout
        flow.to(memory_format=torch.channels_last)  # a tenth faster on a CPU
    module = module_of(stage, flow, rule, batches, settings)
    every = settings["sheet_every"]
    fit(module, folder, settings["save_every"], precision, every, sheet, settings["devices"])
    if module.global_step >= module.steps and is_first():
        if every and sheet is not None:
            sheet(module.average, module.steps)
        # last: then the stage is finished
        (save_posterior if stage == "posterior" else save)(module.average, folder)


def _velocity(source: Source, settings: dict[str, Any]) -> tuple[Any, Any]:
    """Return an untrained network's flow, or that of `start`, and flow matching."""
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
                f"the velocity in {settings['start']} has another network or other words "
                "than this run's settings: give the channels, blocks and width that it was "
                "made with"
            )
        flow = begun
    return flow, FlowMatching()


def _map(out: Path, settings: dict[str, Any]) -> tuple[Any, Any]:
    """Return the velocity of the run's folder, to be trained, and the rule of its map."""
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
    """Return an untrained posterior map of the run's map's size, and its objective."""
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
