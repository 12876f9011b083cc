"""Shared parts of the training recipes: a stage's module, Lightning's loop, sheets."""

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from recipes.sheet import contact_sheet
from steer.devices import differentiating, usable_device
from steer.files import write_atomically
from steer.flow import composed
from steer.identity import changes

__all__ = ["begun_alike", "divided", "fit", "module_of", "place_of", "sheet_of"]


def module_of(
    stage: str, flow: Any, rule: Any, batches: Callable[[int], Any], settings: Mapping[str, Any]
) -> Any:
    """Return the Lightning module of a stage for a run's settings.

    Args:
        stage: name of the stage; "map" has learning rates scaled by `map_rate`, and its own
            average.
        flow: the flow, which is trained in place.
        rule: see `steer.training.rules`.
        batches: step -> (x_1, prompts).
        settings: the recipe's arguments.
    """
    from steer.training.module import FlowTraining

    second = stage == "map"
    scale = settings["map_rate"] if second else 1.0
    return FlowTraining(
        flow,
        rule,
        batches,
        steps=settings[f"{stage}_steps"],
        seed=settings["seed"] + len(stage),
        average=settings["map_average" if second else "average"],
        muon=scale * settings["muon"],
        adamw=scale * settings["adamw"],
    )


def begun_alike(out: Path, settings: dict[str, Any], *marks: str) -> None:
    """Refuse to resume a run with other settings, because it would not be the same run.

    Args:
        out: the run's folder.
        settings: settings as JSON values.
        marks: files that show that the run has begun. Default: checkpoints and weights of its
            stages.
    """
    file = out / "settings.json"
    begun = [f for mark in marks or ("*/*.ckpt", "*/*.safetensors") for f in out.glob(mark)]
    if not (file.exists() and begun):  # there is nothing to resume
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(settings, indent=1).encode())
        return
    changed = changes(json.loads(file.read_text()), json.loads(json.dumps(settings)))
    if changed:
        was = "; ".join(f"{name}: {both}" for name, both in changed.items())
        raise ValueError(
            f"{out} was started with other settings ({was}): give another `out`, the same "
            f"settings, or delete {file} to continue with the new ones"
        )


def sheet_of(
    folder: Path, prompts: Sequence[str], guidance: float | None
) -> Callable[[Any, int], None]:
    """Return a function that samples the prompts with fixed noise, and writes the sheet."""
    from steer.training.rules import guided_velocity

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


def place_of(device: str | None, devices: int) -> torch.device:
    """Return the device of this process.

    Args:
        device: kind of device; for one process also with a number. Default: Lightning's choice.
        devices: number of processes, one per device.

    Raises:
        ValueError: several processes on one numbered device, or no such device.
    """
    import lightning as L

    usable_device(device)
    asked = None if device is None else torch.device(device)
    if asked is not None and asked.index is not None and devices > 1:
        raise ValueError(
            f"device {device!r} is one device, and devices={devices} takes one for each process: "
            f"give --device {asked.type}, or CUDA_VISIBLE_DEVICES to choose which"
        )
    if asked is not None and (asked.index is not None or asked.type == "cpu"):
        return asked
    kind = "auto" if asked is None else asked.type
    return L.Fabric(
        accelerator=kind, devices=devices, strategy="ddp" if devices > 1 else "auto"
    ).device


def divided(batch_size: int, devices: int) -> None:
    """Raise an error if processes would have different numbers of rows: gradients are averaged.

    Raises:
        ValueError: the batch does not divide.
    """
    if batch_size % devices:
        raise ValueError(
            f"batch_size {batch_size} does not divide by {devices} processes, which have one "
            f"share of it each: give a multiple of {devices}"
        )


def fit(
    module: Any,
    folder: Path,
    save_every: int,
    precision: str = "auto",
    sheet_every: int = 0,
    sheet: Callable[[Any, int], None] | None = None,
    devices: int = 1,
    strategy: Any = None,
    place: torch.device | None = None,
) -> None:
    """Run Lightning's loop, from the last checkpoint in the folder if there is one.

    SIGINT and SIGTERM end it after the current step, with its state saved.

    Args:
        module: a LightningModule with `steps`, whose batches are a function of the global step.
        folder: for checkpoints and the CSV log.
        save_every: steps between checkpoints.
        precision: precision of Lightning; "auto" is bf16-mixed if the hardware has bf16, else
            32-true.
        sheet_every: steps between calls of `sheet`.
        sheet: called with (module.average, global step).
        devices: number of processes, one per device; they divide every batch.
        strategy: Lightning's. Default: DDP for several processes.
        place: the device of this process, see `place_of`. Default: Lightning's choice.
    """
    import lightning as L
    from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint, ProgressBar

    from steer.training.checkpoints import Checkpoints, usable
    from steer.training.data import step_loader
    from steer.training.log import KeepRows, RowLog
    from steer.training.processes import with_others
    from steer.training.progress import progress
    from steer.training.stopping import Signals, StepEnd
    from steer.tuning.trainer import KNOWN, loggers

    def after(trainer: L.Trainer, module: Any, *_: Any) -> None:
        due = sheet is not None and sheet_every and trainer.is_global_zero
        if due and trainer.global_step % sheet_every == 0:
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
    _, *boards = loggers(folder, step=step)  # `log` keeps the rows

    def left() -> str:
        found = usable(folder)
        there = "nothing yet" if found is None else f"the state after step {found[1]}"
        return f"stopped, unfinished: run the same command again. {folder} holds {there}"

    signals = Signals(left)
    callbacks = [saver, seen, LambdaCallback(on_train_batch_end=after), KeepRows(log, step, every)]
    trainer = L.Trainer(
        max_steps=module.steps,
        max_epochs=-1,
        accelerator="auto" if place is None else place.type,
        devices=devices if place is None or place.type == "cpu" or devices > 1 else [place.index],
        strategy=strategy or ("ddp" if devices > 1 else "auto"),
        use_distributed_sampler=False,
        precision=precision,  # type: ignore[arg-type]
        logger=boards,
        log_every_n_steps=every,
        plugins=[Checkpoints()],
        callbacks=[*callbacks, StepEnd(signals, folder, lambda module: True)],
        enable_progress_bar=isinstance(seen, ProgressBar),
        enable_model_summary=False,
    )
    with signals.heard(), warnings.catch_warnings(), with_others(trainer), differentiating():
        for message in KNOWN:
            warnings.filterwarnings("ignore", message)
        trainer.fit(module, step_loader(module.steps), ckpt_path=last, weights_only=True)
