"""A run's curves as one CSV file: one row per step, none written twice."""

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from steer.files import write_atomically

__all__ = ["KeepRows", "RowLog"]


class RowLog(Logger):
    """Write metrics to `folder/log/version_0/metrics.csv`, one row per call, immediately.

    Args:
        folder: the folder of the run.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.file = folder / "log" / "version_0" / "metrics.csv"
        self.names: list[str] = []
        self.rows = 0

    @property
    def name(self) -> str:
        """The name for Lightning."""
        return "log"

    @property
    def version(self) -> int:
        """The version for Lightning: one log per run, even if it is resumed."""
        return 0

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the run's folder records the settings."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Append a row; if it has new columns, the file is rewritten with them."""
        row = {name: float(value) for name, value in metrics.items()}
        row["step"] = self.rows if step is None else step
        if new := sorted(row.keys() - set(self.names)):
            rows = self._read()
            self.names = sorted([*self.names, *new])
            self._write([*rows, {k: repr(v) for k, v in row.items()}])
        else:
            with self.file.open("a", encoding="utf-8", newline="") as file:
                file.write(_lines(self.names, [row]))
            self.rows += 1

    def take_up(self, step: int | None = None, rows: int | None = None) -> None:
        """Delete rows that were written after the checkpoint from which a run resumes.

        Args:
            step: step of the checkpoint; None: there is none, and the log starts again.
            rows: number of rows at the checkpoint; None: those up to the step.
        """
        if step is None:
            self.file.unlink(missing_ok=True)
            self.names, self.rows = [], 0
            return
        found = self._read()
        whole = found[:rows] if rows is not None else [r for r in found if _step(r) <= step]
        if whole:
            self._write(whole)
        else:
            self.take_up()

    def _read(self) -> list[dict[str, str]]:
        """Return the complete rows; a truncated last row is left out."""
        if not self.file.exists():
            return []
        text = self.file.read_text(encoding="utf-8", errors="replace")
        reader = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]))
        rows = [row for row in reader if None not in row and None not in row.values()]
        self.names = sorted(set(reader.fieldnames or ()))
        return rows

    def _write(self, rows: list[dict[str, Any]]) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        head = ",".join(self.names) + "\n"
        write_atomically(self.file, (head + _lines(self.names, rows)).encode())
        self.rows = len(rows)


class KeepRows(L.Callback):
    """Store the log's number of rows in checkpoints, so that no row is lost or written twice.

    Args:
        log: the log.
        step: step of the checkpoint from which the run resumes, if it does.
        every: steps between rows of the module's metrics, which are written before a checkpoint
            (Lightning would write them after it); 0: the module writes its rows itself.
    """

    def __init__(self, log: RowLog, step: int | None = None, every: int = 0) -> None:
        self.kept, self.step, self.rows, self.every = log, step, None, every

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a resumed run."""
        return {"rows": json.dumps(self.kept.rows)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of a run."""
        self.rows = json.loads(state["rows"])

    def on_fit_start(self, trainer: L.Trainer, module: Any) -> None:
        """Delete the rows after the checkpoint, before a new one is written."""
        if trainer.is_global_zero:
            self.kept.take_up(self.step, self.rows)

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        """Write a row, if it is due."""
        if self.every and trainer.global_step % self.every == 0:
            self.kept.log_metrics(trainer.callback_metrics, trainer.global_step)


def _lines(names: list[str], rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    csv.DictWriter(text, names, restval="", lineterminator="\n").writerows(rows)
    return text.getvalue()


def _step(row: Mapping[str, str]) -> float:
    try:
        return float(row.get("step") or "inf")
    except ValueError:
        return float("inf")
