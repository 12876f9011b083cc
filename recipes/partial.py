"""What is finished of an unfinished run: kept beside its folder, so that it can go on."""

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import safetensors.torch
import torch
from rich.console import Console
from torch import Tensor

from recipes.terminal import progress
from steer.files import pack, read_notes, write_atomically

__all__ = ["Partial", "Unit", "units_of"]


class Labelled(Protocol):
    """A row of a comparison: what the tables call it."""

    @property
    def label(self) -> str:
        """Its name."""


Row = TypeVar("Row", bound=Labelled)


@dataclass(frozen=True)
class Unit(Generic[Row]):
    """What is finished or not: of a row, the prompts from `start` to `end`, and a seed."""

    index: int
    row: Row
    start: int
    end: int
    seed: int

    @property
    def name(self) -> str:
        """Its file's name."""
        return f"{self.index:03d}_{self.seed:06d}_{self.start:06d}"


def units_of(
    rows: Sequence[Row], prompts: int, seeds: Iterable[int], size: Callable[[Row], int]
) -> list[Unit[Row]]:
    """Return the units of a comparison, seed by seed, row by row.

    Args:
        rows: what is compared.
        prompts: how many there are.
        seeds: of the pictures.
        size: row -> how many prompts a unit of it has.
    """
    return [
        Unit(i, row, start, min(start + size(row), prompts), seed)
        for seed in seeds
        for i, row in enumerate(rows)
        for start in range(0, prompts, size(row))
    ]


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
        units: Sequence[Unit[Row]],
        work: Mapping[str, int],
        run: Callable[[Unit[Row]], tuple[Mapping[str, Tensor], Mapping[str, Any]]],
        console: Console,
    ) -> None:
        """Run the units that are not finished yet, with a progress bar of the whole work.

        Args:
            units: in order.
            work: name -> network calls.
            run: unit -> its tensors and notes.
            console: where the bar is shown.
        """
        with progress(console, "{task.percentage:>3.0f}%") as bar:
            task = bar.add_task("", total=sum(work.values()))
            for unit in units:
                bar.update(task, description=unit.row.label)
                if not self.has(unit.name):
                    self.add(unit.name, *run(unit))
                bar.update(task, advance=work[unit.name])

    def read(self, unit: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return a finished unit's tensors and notes."""
        file = self._file(unit)
        return safetensors.torch.load_file(file), read_notes(file)

    def done(self, units: Sequence[Unit[Row]], work: Mapping[str, int]) -> str:
        """Say how much of the work is finished; nothing, where none is."""
        calls = sum(work[unit.name] for unit in units if self.has(unit.name))
        return f", {calls} of them done already" if calls else ""

    def gathered(self, units: Sequence[Unit[Row]]) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Put the units of one row together again: tensors (prompts, seeds, ...), mean notes."""
        read: dict[int, list[tuple[dict[str, Tensor], dict[str, Any]]]] = {}
        for unit in units:
            read.setdefault(unit.seed, []).append(self.read(unit.name))
        parts = list(read.values())
        tensors = {
            name: torch.stack([torch.cat([t[name] for t, _ in part]) for part in parts], 1)
            for name in parts[0][0][0]
        }
        notes = [note for part in parts for _, note in part]
        return tensors, {k: sum(note[k] for note in notes) / len(notes) for k in notes[0]}

    def drop(self) -> None:
        """Remove the folder with all units."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def drop_if_empty(self) -> None:
        """Remove the folder if no unit is finished."""
        if not any(self.folder.glob("*.safetensors")):
            self.drop()
