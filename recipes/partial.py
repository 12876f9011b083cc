"""What is finished of an unfinished run: kept beside its folder, so that it can go on."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torch import Tensor

from steer.files import pack, read_notes, write_atomically

__all__ = ["Partial"]


class Partial:
    """The finished units of an unfinished run, in a hidden folder beside its own.

    Args:
        out: the run's folder.
        identity: what an earlier start must have had in common for its units to count: settings,
            prompts, files. JSON values.
        overwrite: drop the units of an earlier start that had another identity.

    Attributes:
        folder: where the units are.

    Raises:
        FileExistsError: there are units of another identity, and `overwrite` is not set.
    """

    def __init__(self, out: Path, identity: Mapping[str, Any], overwrite: bool = False) -> None:
        self.folder = out.parent / f".{out.name}.partial"
        config = self.folder / "identity.json"
        content = json.dumps(identity, indent=1)
        other = config.exists() and config.read_text(encoding="utf-8") != content
        if other and not overwrite:
            raise FileExistsError(
                f"an interrupted run with other settings, prompts or files is kept in "
                f"{self.folder}: give its command again to finish it, choose another folder, or "
                "say --overwrite to drop it"
            )
        if other:
            self.drop()
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            write_atomically(config, content.encode())
        except OSError:
            self.drop_if_empty()
            raise

    def _file(self, unit: str) -> Path:
        return self.folder / f"{unit}.safetensors"

    def has(self, unit: str) -> bool:
        """Return whether a unit is finished."""
        return self._file(unit).exists()

    def add(self, unit: str, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
        """Keep a finished unit: tensors, and JSON values as the file's metadata."""
        write_atomically(self._file(unit), pack(tensors, notes))

    def fill(
        self,
        units: Sequence[Any],
        work: Mapping[str, int],
        run: Callable[[Any], tuple[Mapping[str, Tensor], Mapping[str, Any]]],
        console: Console,
    ) -> None:
        """Run the units that are not finished yet, with a progress bar of the whole work.

        Args:
            units: in order; each has a `name`, and a `row` with a `label`.
            work: name -> network calls.
            run: unit -> its tensors and notes.
            console: where the bar is shown.
        """
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("", total=sum(work.values()))
            for unit in units:
                progress.update(task, description=unit.row.label)
                if not self.has(unit.name):
                    self.add(unit.name, *run(unit))
                progress.update(task, advance=work[unit.name])

    def read(self, unit: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return a finished unit's tensors and notes."""
        file = self._file(unit)
        return safetensors.torch.load_file(file), read_notes(file)

    def drop(self) -> None:
        """Remove the folder with all units."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def drop_if_empty(self) -> None:
        """Remove the folder if no unit is finished."""
        if not any(self.folder.glob("*.safetensors")):
            self.drop()
