"""Lightning's Trainer of a tuning run: precision, loggers, device, and the loop itself."""

import importlib.util
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger

from steer.training.checkpoints import Checkpoints
from steer.training.log import RowLog
from steer.training.processes import with_others
from steer.tuning.module import RewardTuning
from steer.tuning.settings import Settings
from steer.tuning.sharding import ShardedBase

__all__ = ["device_of_run", "fit", "loggers", "precision", "trainer_of"]

KNOWN = (
    "Found .* in eval mode",  # so that there is no dropout
    "You're resuming from a checkpoint that ended before the epoch",  # batches are keyed by step
    "Checkpoint directory .* exists",  # the run has its own
    "The '.*' does not have many workers",  # the loader only counts
    "FSDP2-wrapped module .* returned a view",  # nothing is changed in place
)
"""Warnings of Lightning that are irrelevant here."""


def device_of_run(settings: Settings) -> torch.device:
    """Return the device of this process, as Lightning chooses it."""
    strategy = "ddp" if settings.sharded else settings.strategy
    return L.Fabric(
        accelerator=settings.accelerator, devices=settings.devices, strategy=strategy
    ).device


def trainer_of(
    settings: Settings,
    steps: int,
    accumulate: int,
    callbacks: Sequence[L.Callback],
    logs: Sequence[Any] = (),
    checkpoints: Checkpoints | None = None,
) -> L.Trainer:
    """Return the Trainer of a run.

    Args:
        settings: settings of the run.
        steps: optimizer steps.
        accumulate: micro-batches per step on each process.
        callbacks: callbacks of the run.
        logs: Lightning's loggers.
        checkpoints: the plugin that writes checkpoints; None: there are none.
    """
    return L.Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator=settings.accelerator,
        devices=settings.devices,
        strategy=ShardedBase() if settings.sharded else settings.strategy,
        precision=precision(settings),  # type: ignore[arg-type]
        accumulate_grad_batches=accumulate,
        gradient_clip_val=settings.gradient_clip,
        use_distributed_sampler=False,
        logger=list(logs),
        plugins=None if checkpoints is None else [checkpoints],
        callbacks=list(callbacks),
        enable_checkpointing=checkpoints is not None,
        enable_progress_bar=any(isinstance(one, ProgressBar) for one in callbacks),
        enable_model_summary=False,
        log_every_n_steps=1,
    )


def fit(trainer: L.Trainer, module: RewardTuning, last: Path | None = None) -> None:
    """Run the loop, from a checkpoint if there is one.

    Raises:
        ChildProcessError: another process of the run has ended, and this one waited for it.
    """
    with warnings.catch_warnings():
        for message in KNOWN:
            warnings.filterwarnings("ignore", message)
        with with_others(trainer):
            trainer.fit(module, module.loader(), ckpt_path=last, weights_only=True)


def precision(settings: Settings) -> str:
    """Return Lightning's name of the precision: bf16-mixed for "auto" if the device has bf16."""
    if settings.precision != "auto":
        return settings.precision
    on_gpu = settings.accelerator != "cpu" and torch.cuda.is_available()
    has_bf16 = torch.cuda.is_bf16_supported() if on_gpu else torch.cpu._is_avx512_bf16_supported()
    return "bf16-mixed" if has_bf16 else "32-true"


def loggers(out: Path, wandb: str | None = None, step: int | None = None) -> list[Any]:
    """Return CSV always, TensorBoard where it is installed, Weights & Biases on request.

    Args:
        out: the run's folder.
        wandb: the project of Weights & Biases, if any.
        step: step from which the run resumes; later rows of the log are discarded.

    Raises:
        ImportError: Weights & Biases is requested but not installed.
    """
    found: list[Any] = [RowLog(out)]
    if importlib.util.find_spec("tensorboard") or importlib.util.find_spec("tensorboardX"):
        purged = None if step is None else step + 1
        found.append(TensorBoardLogger(out, name="tensorboard", version="", purge_step=purged))
    if wandb:
        if importlib.util.find_spec("wandb") is None:
            raise ImportError(
                f"wandb={wandb!r} needs Weights & Biases: pip install wandb, or leave wandb out; "
                "CSV and TensorBoard are written anyway"
            )
        found.append(WandbLogger(project=wandb, save_dir=out, name=out.name))
    return found
