"""`steer train`: a velocity by flow matching, then its flow map, both from one command."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from recipes.sheet import contact_sheet
from steer.files import expanded, tidy, write_atomically
from steer.flow import composed
from steer.identity import changes
from steer.lock import locked

__all__ = ["begun_alike", "data_of", "drawing", "fit", "sheet_of", "train"]

SHEET = """blue apple|purple fox|green cat|red frog|blue pizza|red apple|green apple|fox|cat|
panda|tiger|elephant|penguin|frog|octopus|butterfly|strawberry|watermelon|banana|carrot|hamburger|
pizza|cupcake|teapot|sunflower|rose|cactus|grinning face|robot|flat fox|glossy 3d fox|animal|
mammal|bird|food|fruit|drink|face|plant|blue animal|"""


def train(
    out: Path = Path("runs/emoji"),
    data: Literal["emoji"] = "emoji",
    stages: list[Literal["velocity", "map"]] = ["velocity", "map"],  # noqa: B006
    channels: list[int] = [32, 64, 128],  # noqa: B006
    blocks: list[int] = [1, 2, 2],  # noqa: B006
    width: int = 192,
    batch_size: int = 40,
    velocity_steps: int = 1800,
    map_steps: int = 440,
    muon: float = 2e-3,
    adamw: float = 1e-3,
    average: float = 0.998,
    map_rate: float = 0.5,
    map_average: float = 0.99,
    guidance: float = 3.0,
    empty: float = 0.12,
    recoloured: float = 0.3,
    shift: int = 2,
    start: Path | None = None,
    seed: int = 0,
    save_every: int = 50,
    sheet_every: int = 300,
    precision: str = "auto",
) -> None:
    """Train a two-time network: first its velocity, then the map of the guided velocity.

    A run that stopped goes on from its last checkpoint when it is started again, and ends with
    the weights that it would have had. The finished model is `OUT/map`, for `steer.load`.

    Args:
        out: the run's folder.
        data: what to draw.
        stages: which stages to run; the map takes the velocity that is in the run's folder.
        channels: channels of each level of the network.
        blocks: residual blocks of each level.
        width: size of the condition vector.
        batch_size: pictures a step.
        velocity_steps: length of the first stage.
        map_steps: length of the second.
        muon: learning rate of the matrices.
        adamw: learning rate of the other parameters.
        average: decay of the running average of the weights.
        map_rate: both learning rates are scaled by this in the second stage.
        map_average: decay of the running average in the second stage.
        guidance: scale of classifier-free guidance that the map has built in; 1 for none.
        empty: share of empty prompts.
        recoloured: share of pictures that are turned to another colour, which their caption names.
        shift: largest random shift of a picture, in pixels.
        start: a trained velocity to begin with, a folder. Default: from scratch.
        seed: fixes everything that is drawn.
        save_every: steps between checkpoints.
        sheet_every: steps between sample sheets; 0 for none.
        precision: Lightning's; "auto" is bf16-mixed where the hardware has bf16, else 32-true.
    """
    settings = {
        k: os.fspath(v) if isinstance(v, Path) else v
        for k, v in locals().items()
        if k not in ("out", "stages", "precision")
    }
    out = expanded(out)
    from steer.models.loading import load, save
    from steer.models.two_time import NetworkFlow, TwoTimeUNet
    from steer.training.data import Batches
    from steer.training.module import FlowTraining
    from steer.training.rules import FlowMatching, MapDistillation

    _, words = data_of(data)
    count, draw = drawing(recoloured, shift)
    batches = Batches(count, draw, batch_size, seed=seed, empty=empty)
    torch.manual_seed(seed)
    with locked(out):
        tidy(out)
        begun_alike(out, settings)
        for stage in stages:
            folder = out / stage
            if all((folder / name).exists() for name in ("model.safetensors", "config.json")):
                print(f"{folder} is finished")
                continue
            if stage == "velocity":
                flow = NetworkFlow(TwoTimeUNet(words, channels, blocks, width=width))
                if start is not None:
                    fresh, flow = flow, load(start).train().requires_grad_(True)
                    if flow.network.config != fresh.network.config:
                        raise ValueError(
                            f"the velocity in {start} has another network or other words than "
                            "this run's settings: give the channels, blocks and width that it was "
                            "made with"
                        )
                rule: Any = FlowMatching()
                scale, decay, steps = 1.0, average, velocity_steps
            else:
                flow = load(out / "velocity").train().requires_grad_(True)
                rule = MapDistillation(load(out / "velocity"), guidance)
                scale, decay, steps = map_rate, map_average, map_steps
            flow.network.to(memory_format=torch.channels_last)  # a tenth faster on a CPU
            module = FlowTraining(
                flow,
                rule,
                batches,
                steps=steps,
                seed=seed + len(stage),
                average=decay,
                muon=scale * muon,
                adamw=scale * adamw,
            )
            sheet = sheet_of(folder / "sheets", guidance if stage == "velocity" else None)
            fit(module, folder, save_every, precision, sheet_every, sheet)
            if module.global_step >= steps:
                if sheet_every:
                    sheet(module.average, steps)
                save(module.average, folder)  # last: then the stage is finished


def data_of(name: str) -> tuple[Any, list[str]]:
    """Load the data set and the words of all its captions."""
    from recipes.data.emoji import COLOURS, load
    from steer.models.words import split

    emoji = load()
    texts = [*emoji.labels, *emoji.styles, *emoji.groups, *emoji.subgroups, *COLOURS]
    texts += [t for tags in emoji.tags for t in tags] + ["brown", "grey", "black", "white"]
    return emoji, sorted({w for text in texts for w in split(text)})


def drawing(recoloured: float, shift: int) -> tuple[int, Callable[..., tuple[Tensor, str]]]:
    """Return how many pictures there are to train on, and how one's x and caption are drawn."""
    from recipes.data import emoji as plain
    from recipes.data import recolour
    from recipes.data.shifts import shifted

    emoji, other = plain.load(), recolour.load()
    index = emoji.train.tolist()

    def draw(i: int, generator: torch.Generator) -> tuple[Tensor, str]:
        i = index[i]
        if float(torch.rand((), generator=generator)) < recoloured:
            name = other.draw(i, generator)
            if name is not None:
                return other.picture(i, name), other.captions(i, name, generator)
        return emoji.images[i], emoji.captions(i, generator)

    moved = shifted(emoji.images[index], draw, shift)

    def drawn(i: int, generator: torch.Generator) -> tuple[Tensor, str]:
        picture, caption = moved(i, generator)
        return 2 * picture - 1, caption  # what the network decodes to it

    return len(index), drawn


def begun_alike(out: Path, settings: dict[str, Any]) -> None:
    """Refuse to go on with a run under other settings: it would not be the same run."""
    file = out / "settings.json"
    begun = [*out.glob("*/*.ckpt"), *out.glob("*/model.safetensors")]
    if not (file.exists() and begun):  # nothing that would go on
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(settings, indent=1).encode())
        return
    changed = changes(json.loads(file.read_text()), json.loads(json.dumps(settings)))
    if changed:
        was = "; ".join(f"{name}: {both}" for name, both in changed.items())
        raise ValueError(
            f"{out} was begun with other settings ({was}): give another `out`, the same settings, "
            f"or delete {file} to go on with the new ones"
        )


def sheet_of(folder: Path, guidance: float | None) -> Callable[[Any, int], None]:
    """Return a function that draws the fixed prompts with fixed noise, and writes the sheet."""
    from steer.training.rules import guided_velocity

    prompts = SHEET.replace("\n", "").split("|")

    @torch.no_grad()
    def draw(flow: Any, step: int) -> None:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(len(prompts), *flow.event_shape, generator=generator)
        x = x.to(next(flow.parameters()).device)
        if guidance is None:  # the map: four jumps
            x = composed(flow.given(prompts), x, [0.0, 0.25, 0.5, 0.75, 1.0])
        else:  # the velocity: 12 Euler steps, guided
            velocity = guided_velocity(flow, prompts, guidance)
            for k in range(12):
                x = x + velocity(x, torch.full((len(x),), k / 12, device=x.device)) / 12
        contact_sheet(flow.decode(x), prompts, folder / f"{step:06d}.png")

    return draw


def fit(
    module: Any,
    folder: Path,
    save_every: int,
    precision: str = "auto",
    sheet_every: int = 0,
    sheet: Callable[[Any, int], None] | None = None,
) -> None:
    """Run Lightning's loop on, from the last checkpoint in the folder where there is one.

    SIGINT and SIGTERM end it after the step that is being taken, its state saved.

    Args:
        module: a LightningModule with `steps`, whose batches are a function of the global step.
        folder: for checkpoints and the CSV log.
        save_every: steps between checkpoints.
        precision: Lightning's; "auto" is bf16-mixed where the hardware has bf16, else 32-true.
        sheet_every: steps between calls of `sheet`.
        sheet: called with (module.average, global step).
    """
    import lightning as L
    from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint, ProgressBar

    from steer.training.checkpoints import Checkpoints, usable
    from steer.training.data import step_loader
    from steer.training.log import KeepRows, RowLog
    from steer.training.progress import progress
    from steer.training.stopping import Signals, StepEnd

    def after(trainer: L.Trainer, module: Any, *_: Any) -> None:
        if sheet is not None and sheet_every and trainer.global_step % sheet_every == 0:
            sheet(module.average, trainer.global_step)

    if precision == "auto":
        has_bf16 = torch.cuda.is_available() or torch.cpu._is_avx512_bf16_supported()
        precision = "bf16-mixed" if has_bf16 else "32-true"
    saver = ModelCheckpoint(
        folder,
        filename="last",
        every_n_train_steps=save_every,
        save_top_k=1,
        enable_version_counter=False,
    )
    seen, log = progress(), RowLog(folder)
    last, step = usable(folder) or (None, None)
    every = min(10, module.steps)

    def left() -> str:
        found = usable(folder)
        there = "nothing yet" if found is None else f"the state after step {found[1]}"
        return f"stopped, unfinished: run the same command again. {folder} holds {there}"

    signals = Signals(left)
    callbacks = [saver, seen, LambdaCallback(on_train_batch_end=after), KeepRows(log, step, every)]
    trainer = L.Trainer(
        max_steps=module.steps,
        max_epochs=-1,
        devices=1,
        precision=precision,  # type: ignore[arg-type]
        logger=False,
        plugins=[Checkpoints()],
        callbacks=[*callbacks, StepEnd(signals, folder, lambda module: True)],
        enable_progress_bar=isinstance(seen, ProgressBar),
        enable_model_summary=False,
    )
    with signals.heard():
        trainer.fit(module, step_loader(module.steps), ckpt_path=last, weights_only=True)
