"""Lightning callbacks of a tuning run: instruments, sheets, the best adapters, an early stop."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from steer.adapters.lora import Adapted
from steer.adapters.store import save_adapters
from steer.files import write_atomically
from steer.pictures import captioned_grid
from steer.reward import learners
from steer.training.log import KeepRows
from steer.training.progress import progress
from steer.training.stopping import Signals, StepEnd
from steer.tuning.alarms import Alarm
from steer.tuning.front import figures
from steer.tuning.panel import Panel, has_pictures
from steer.tuning.request import Tuning

__all__ = ["SaveAdapters", "Watch", "onlookers"]


def onlookers(
    tuning: Tuning,
    tuned: Adapted,
    out: Path | None,
    notes: Mapping[str, Any],
    signals: Signals,
    kept_rows: KeepRows | None = None,
) -> "tuple[Watch | None, SaveAdapters | None, list[L.Callback]]":
    """Return the callbacks of a run: the instruments, the writer of adapters, and all of them.

    Args:
        tuning: the request.
        tuned: the flow with its adapters.
        out: the run's folder; None: nothing is written.
        notes: metadata of the run for the adapters' files.
        signals: handling of the signals that end the run.
        kept_rows: callback that stores the length of the log in checkpoints.
    """
    chosen, callbacks = tuning.settings, list[L.Callback]()
    watch = saver = None
    if chosen.check_every and has_pictures(tuned):
        watch = Watch(
            Panel.of(tuning, tuned), out, chosen.check_every, steps=chosen.check_steps,
            early_stop=chosen.early_stop, metadata=notes, together=chosen.sharded,
        )  # fmt: skip
        callbacks.append(watch)
    if chosen.progress:
        callbacks.append(progress())
    if out is not None:
        saver = SaveAdapters(tuned, out, chosen.save_every, notes)
        kept = ModelCheckpoint(
            out / "checkpoints", filename="last", every_n_train_steps=chosen.save_every,
            save_top_k=1, enable_version_counter=False,
        )  # fmt: skip
        callbacks += [saver, kept]
        callbacks += [] if kept_rows is None else [kept_rows]
    checkpoints = None if out is None else out / "checkpoints"
    callbacks.append(StepEnd(signals, checkpoints, lambda module: module.between_steps))
    return watch, saver, callbacks


class Watch(L.Callback):
    """Read the instruments at intervals, and act on the readings.

    Args:
        panel: what is sampled, and how it is measured.
        out: the run's folder, for readings.jsonl, sheets/ and best/; None: nothing is written.
        every: steps between checks.
        steps: number of jumps for the pictures of a check.
        early_stop: end the run when this many consecutive checks raised an alarm; 0: never.
        metadata: metadata of the run for best/.
        together: whether all processes sample, because none can call the network alone; the first
            one writes. Default: only the first one samples.
    """

    def __init__(
        self,
        panel: Panel,
        out: Path | None,
        every: int,
        *,
        steps: int = 1,
        early_stop: int = 2,
        metadata: Mapping[str, Any] | None = None,
        together: bool = False,
    ) -> None:
        self.together = together
        self.panel, self.out, self.every, self.steps = panel, out, every, steps
        self.early_stop, self.metadata = early_stop, dict(metadata or {})
        self.readings: list[dict[str, Any]] = []
        self.best: dict[str, Any] | None = None
        self.alarmed, self.seconds, self.stopped = 0, 0.0, ""
        self.checked: int | None = None  # step of the last check, on all processes

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a resumed run."""
        return {
            "readings": json.dumps(self.readings),
            "best": json.dumps(self.best),
            "alarmed": self.alarmed,
            "seconds": self.seconds,
            "stopped": self.stopped,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up where a run was."""
        self.readings, self.best = json.loads(state["readings"]), json.loads(state["best"])
        self.checked = self.readings[-1]["step"] if self.readings else None
        self.alarmed, self.seconds = state["alarmed"], state["seconds"]
        self.stopped = state["stopped"]

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        """Check once before the first step, when the tuned pictures are those of the base."""
        if self.checked is None:
            self.check(trainer, module)
        if self.stopped and self.early_stop:  # a run that was stopped by alarms is not resumed
            trainer.should_stop = True

    def on_train_end(self, trainer: L.Trainer, module: Any) -> None:
        """Check the last weights, if the run does not end with a check."""
        if self.checked is not None and self.checked < trainer.global_step:
            self.check(trainer, module)

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        """Check at intervals of optimizer steps."""
        k = trainer.global_step
        if k % self.every == 0 and k and (self.checked is None or self.checked < k):
            self.check(trainer, module)

    def check(self, trainer: L.Trainer, module: Any) -> None:
        """Measure, log, keep the best, and stop if the alarms require it."""
        start = time.perf_counter()
        if trainer.is_global_zero or self.together:
            self._check(trainer, module)
        self.seconds += time.perf_counter() - start
        self.checked = trainer.global_step
        stop = trainer.strategy.broadcast(self.stopped)
        if stop:
            trainer.should_stop = True

    def _check(self, trainer: L.Trainer, module: Any) -> None:
        learning = learners(self.panel.reward)  # from the objective's pictures, not from these
        modes = [(m, m.training) for m in [*self.panel.tuned.modules(), *learning]]
        self.panel.tuned.eval()
        for learner in learning:
            learner.training = False
        reading, alarms, images = self.panel.read(1.0, self.steps, drift=True)
        numbers = reading.as_dict() | self.panel.terms(images)
        step = trainer.global_step
        entry = {
            "step": step, "nfe": module.nfe, "reward_calls": module.reward_calls,
            "alarms": [str(a) for a in alarms], **numbers,
        }  # fmt: skip
        self.readings.append(entry)
        for logger in trainer.loggers:
            logger.log_metrics({f"check/{k}": v for k, v in numbers.items()}, step)
        for alarm in alarms if trainer.is_global_zero else ():
            print(f"step {step}: alarm: {alarm}")
        self.alarmed = self.alarmed + 1 if alarms else 0
        if self.early_stop and self.alarmed >= self.early_stop:
            self.stopped = f"step {step}: {alarms[0]}"
            many = f"{self.alarmed} checks with an alarm in a row"
            if trainer.is_global_zero:
                print(f"stopped at step {step}, after {many}")
        self._keep_best(entry, alarms, trainer.is_global_zero)
        if self.out is not None and trainer.is_global_zero:
            self._write(step, images, trainer)
        for part, training in modes:  # as before: frozen networks evaluate
            part.training = training

    def _keep_best(self, entry: dict[str, Any], alarms: Sequence[Alarm], writes: bool) -> None:
        """Keep the adapters that the judge scores highest; without one, the last without alarm."""
        name = "judge" if "judge" in entry else "reward"
        if name == "reward" and alarms:
            return
        if self.best is None or name == "reward" or entry[name] > self.best[name]:
            self.best = entry
            if self.out is not None and writes:
                known = {**self.metadata, "steps": entry["step"], "figures": figures(entry)}
                save_adapters(self.panel.tuned, self.out / "best", known)

    def _write(self, step: int, images: Tensor, trainer: L.Trainer) -> None:
        assert self.out is not None
        lines = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in self.readings)
        write_atomically(self.out / "readings.jsonl", lines.encode())
        folder = self.out / "sheets"
        folder.mkdir(exist_ok=True)
        with torch.no_grad():
            sheet = captioned_grid(self.panel.sheet(images, self.steps))
        partial = folder / f".{step:06d}.png"
        sheet.save(partial, format="PNG")
        partial.replace(folder / f"{step:06d}.png")
        for logger in trainer.loggers:
            board: Any = getattr(logger, "experiment", None)
            if hasattr(board, "add_image"):  # TensorBoard
                import torchvision.transforms.functional as tf

                board.add_image("sheet", tf.to_tensor(sheet), step)


class SaveAdapters(L.Callback):
    """Write the adapters of the last step, in addition to Lightning's checkpoint.

    Args:
        tuned: the flow with the adapters.
        out: the folder.
        every: steps between writes.
        metadata: metadata of the run for the file.
    """

    def __init__(
        self, tuned: Adapted, out: Path, every: int, metadata: Mapping[str, Any] | None = None
    ) -> None:
        self.tuned, self.out, self.every = tuned, out, every
        self.metadata, self.saved = dict(metadata or {}), 0

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        """Write at intervals of optimizer steps, once each."""
        k = trainer.global_step
        if trainer.is_global_zero and k % self.every == 0 and k != self.saved:
            self.saved = k
            self.save(k)

    def save(self, step: int) -> None:
        """Write the adapters now."""
        save_adapters(self.tuned, self.out, {**self.metadata, "steps": step})
