"""`steer finetune` runs for the Tune page: their processes and readings."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

__all__ = ["READINGS", "Tunings", "readings"]

READINGS = "readings.jsonl"
"""A run's checks, a line each."""


class Tunings:
    """The tuning runs that this studio has started, by folder."""

    def __init__(self) -> None:
        self._of: dict[Path, subprocess.Popen[bytes]] = {}

    def running(self, folder: Path) -> bool:
        """Return whether a run of this folder is in progress."""
        one = self._of.get(folder)
        return one is not None and one.poll() is None

    def start(self, folder: Path, options: dict[str, Any]) -> None:
        """Start `steer finetune`, or resume it: the same command continues an interrupted run.

        Raises:
            ValueError: a run of this folder, or any other run, is in progress; or its log is a
                link.
        """
        if any(self.running(other) for other in self._of):
            raise ValueError("a tuning run is at work already: stop it first, or wait")
        words = [f"--{name}={value}" for name, value in options.items()]
        folder.parent.mkdir(parents=True, exist_ok=True)
        if self.log(folder).is_symlink():
            raise ValueError(f"{self.log(folder)} is a link, and is not written to: remove it")
        with self.log(folder).open("wb") as log:
            self._of[folder] = subprocess.Popen(
                [sys.executable, "-m", "recipes.cli", "finetune", *words, "--out", str(folder)],
                stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                env=os.environ | {"COLUMNS": "100"},
            )  # fmt: skip

    def stop(self, folder: Path) -> None:
        """Ask a run to stop; its state is saved.

        Raises:
            ValueError: no run of this folder is in progress.
        """
        if not self.running(folder):
            raise ValueError(f"no tuning run is active in {folder.name!r}")
        self._of[folder].send_signal(signal.SIGINT)

    def error(self, folder: Path) -> str:
        """Return the error with which the run of this folder ended; "" if there was none."""
        one = self._of.get(folder)
        if one is None or one.poll() in {None, 0, 130}:
            return ""
        lines = self.log(folder).read_text(errors="replace").strip().splitlines()
        return lines[-1].removeprefix("error: ") if lines else f"ended with code {one.poll()}"

    def close(self) -> None:
        """Stop all runs when the studio ends."""
        for folder in list(self._of):
            if self.running(folder):
                self.stop(folder)

    @staticmethod
    def log(folder: Path) -> Path:
        """Return the file next to a run folder with the output of its process."""
        return folder.with_name(f".{folder.name}.log")


def readings(folder: Path) -> list[dict[str, Any]]:
    """Return the checks of a run so far, step by step."""
    file = folder / READINGS
    if not file.is_file():
        return []
    whole, _, _ = file.read_text(encoding="utf-8").rpartition("\n")  # the last may be incomplete
    return [json.loads(line) for line in whole.splitlines() if line.strip()]
