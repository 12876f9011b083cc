"""The finished parts of an unfinished run, stored next to its folder so that it can be resumed."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import safetensors.torch
import torch
import yaml
from rich.console import Console
from torch import Tensor

from recipes.crew import Crew
from recipes.identity import is_made_of
from recipes.terminal import progress
from steer.files import expanded, pack, read_notes, refuse_existing, tidy, write_atomically
from steer.identity import changes
from steer.lock import locked
from steer.names import reason

__all__ = ["Partial", "Unit", "free", "is_finished", "units_of"]


class Labelled(Protocol):
    """A row of a comparison, which has a name in tables."""

    @property
    def label(self) -> str:
        """Its name in tables."""


Row = TypeVar("Row", bound=Labelled)


@dataclass(frozen=True)
class Unit(Generic[Row]):
    """A unit of work: a row, the prompts from `start` to `end`, and a seed."""

    index: int
    row: Row
    start: int
    end: int
    seed: int

    @property
    def name(self) -> str:
        """The name of its file."""
        return f"{self.index:03d}_{self.seed:06d}_{self.start:06d}"


def units_of(
    rows: Sequence[Row], prompts: int, seeds: Iterable[int], size: Callable[[Row], int]
) -> list[Unit[Row]]:
    """Return the units of a comparison, seed by seed, row by row.

    Args:
        rows: the rows that are compared.
        prompts: number of prompts.
        seeds: seeds of the pictures.
        size: row -> number of prompts per unit.
    """
    return [
        Unit(i, row, start, min(start + size(row), prompts), seed)
        for seed in seeds
        for i, row in enumerate(rows)
        for start in range(0, prompts, size(row))
    ]


def free(out: Path, overwrite: bool) -> Path:
    """Return the folder to which a run may be written, with `~` expanded, before any work.

    Leftover units of a run that was killed after its folder was complete are removed.

    Raises:
        FileExistsError: the folder exists, and `overwrite` is not set or no run of this package
            wrote it.
        BlockingIOError: another process writes to it.
    """
    out = expanded(out)
    if not overwrite:
        _put_away(out)
    refuse_existing(out, overwrite)
    return out


def free_or_finished(out: Path, overwrite: bool) -> Path:
    """Return the folder as `free` does, or one that may be the finished run with these settings.

    What identifies a run is known only when its model is loaded; `is_finished` decides then.

    Raises:
        FileExistsError, BlockingIOError: as for `free`.
    """
    out = expanded(out)
    return out if not overwrite and is_made_of(out) else free(out, overwrite)


def is_finished(out: Path, identity: Mapping[str, Any], overwrite: bool) -> bool:
    """Return whether a folder is the complete run with this identity, which nothing is to replace.

    Leftover units and locks of a run that was killed after its folder was complete are removed.

    Args:
        out: the run's folder.
        identity: as for `Partial`, recorded in its config.yaml.
        overwrite: whether a run in the folder may be replaced.

    Raises:
        FileExistsError, BlockingIOError: the run cannot be written there, as for `free`.
    """
    out = expanded(out)
    if overwrite or not is_made_of(out, identity):
        free(out, overwrite)
        return False
    with locked(out):  # so that the lock of a killed process is removed as well
        _put_away(out)
    return True


def _put_away(out: Path) -> None:
    """Remove the leftover units of a run that was killed after its folder was complete."""
    units = _beside(out)
    if out.is_dir() and units.is_dir():
        with locked(out, units / ".lock"):
            try:
                begun = json.loads((units / "identity.json").read_text(encoding="utf-8"))
                made = yaml.safe_load((out / "config.yaml").read_text(encoding="utf-8"))
                known = {k: v for k, v in begun["settings"].items() if v is not None}
                whole = {k: v for k, v in made.items() if k != "overwrite"} == known
            except (OSError, ValueError, KeyError, AttributeError, yaml.YAMLError):
                whole = False
            if whole:
                _clear(units)
        with suppress(OSError):
            units.rmdir()  # where it is empty


def _beside(out: Path) -> Path:
    place = out.resolve()
    return place.with_name(f".{place.name}.partial")


def _clear(folder: Path) -> None:
    """Remove the units, and after them the record of their identity."""
    for file in sorted(folder.iterdir(), key=lambda file: file.name == "identity.json"):
        if file.name != ".lock":
            file.unlink()


class Partial:
    """The finished units of an unfinished run, in a hidden folder beside its own.

    It is locked while the block of `with Partial(...)` runs. If no unit was finished, the folder
    is removed.

    Args:
        out: the run's folder.
        identity: what must agree with an earlier start for its units to be used: settings, prompts
            and files, as JSON values.
        overwrite: delete the units of an earlier start that had another identity.
        console: console for the message that a damaged unit is computed again.
        crew: the processes of the run: the first one opens it and holds the lock, the others enter
            when it is open.

    Attributes:
        folder: where the units are.

    Raises:
        FileExistsError: there are units of another identity, and `overwrite` is not set.
        BlockingIOError: another process is working on the same run.
    """

    def __init__(
        self,
        out: Path,
        identity: Mapping[str, Any],
        overwrite: bool = False,
        console: Console | None = None,
        crew: Crew | None = None,
    ) -> None:
        self.folder = _beside(expanded(out))
        self.console = console or Console(stderr=True, markup=False)
        self._held = ExitStack()
        crew = crew or Crew()
        self.joins, self.crew = not crew.first, crew
        if self.joins:
            crew.told(list)  # returns when the first process has opened the run
            return
        self._held.enter_context(locked(out, self.folder / ".lock"))
        try:
            self._begin(json.loads(json.dumps(identity)), overwrite)
        except BaseException:
            self._release()
            raise
        crew.told(list)

    def __enter__(self) -> "Partial":
        return self

    def __exit__(self, *_: object) -> None:
        self._release()

    def _begin(self, identity: Mapping[str, Any], overwrite: bool) -> None:
        tidy(self.folder)
        config = self.folder / "identity.json"
        try:
            before = json.loads(config.read_text(encoding="utf-8"))
        except FileNotFoundError:
            before = {}
        except ValueError as error:
            self._say(f"{config} is damaged ({error}): its part is computed again")
            before = {}
        changed = changes(before, identity)
        finished = any(self.folder.glob("*.safetensors"))
        if changed and finished and before and not overwrite:
            was = "; ".join(f"{name}: {both}" for name, both in changed.items())
            raise FileExistsError(
                f"an interrupted run with other settings, prompts or files ({was}) is kept in "
                f"{self.folder}: give its command again to finish it, choose another folder, or "
                "give --overwrite to delete it"
            )
        if changed:
            _clear(self.folder)
            write_atomically(config, json.dumps(identity, indent=1).encode())
        for file in sorted(self.folder.glob("*.safetensors")):
            try:
                self.read(file.stem)
            except (safetensors.SafetensorError, ValueError) as error:
                file.unlink()
                self._say(f"{file} is damaged ({reason(error)}): it is deleted and computed again")

    def _say(self, text: str) -> None:
        self.console.print(text, soft_wrap=True)

    def _release(self) -> None:
        """Release the lock, and delete the folder if it has no finished unit."""
        if self.joins:
            return
        if self.folder.is_dir() and not any(self.folder.glob("*.safetensors")):
            _clear(self.folder)
        self._held.close()
        with suppress(OSError):
            self.folder.rmdir()  # where it is empty

    def _file(self, unit: str) -> Path:
        return self.folder / f"{unit}.safetensors"

    def has(self, unit: str) -> bool:
        """Return whether a unit is finished."""
        return self._file(unit).exists()

    def add(self, unit: str, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
        """Store a finished unit: tensors, and JSON values as the file's metadata.

        If several processes have computed it together, the first one stores it.
        """
        if not self.crew.writes:
            return
        write_atomically(self._file(unit), pack(tensors, notes))

    def fill(
        self,
        units: Sequence[Unit[Row]],
        work: Mapping[str, int],
        run: Callable[[Unit[Row]], tuple[Mapping[str, Tensor], Mapping[str, Any]]],
        console: Console,
        crew: Crew | None = None,
    ) -> None:
        """Run the units that are not finished yet, with a progress bar for all work.

        Args:
            units: units in order.
            work: name -> network calls.
            run: unit -> its tensors and notes.
            console: console of the bar.
            crew: the processes that share the work. On the first one this returns when all is
                done.
        """
        crew = crew or Crew()
        left = crew.told(lambda: [unit.name for unit in units if not self.has(unit.name)])
        mine = set(crew.share(left)) if crew.count > 1 else {unit.name for unit in units}
        with progress(console, "{task.percentage:>3.0f}%") as bar:
            own = [unit for unit in units if unit.name in mine]
            task = bar.add_task("", total=sum(work[unit.name] for unit in own))
            for unit in own:
                bar.update(task, description=unit.row.label)
                if crew.together or not self.has(unit.name):
                    with crew.joint():
                        made = run(unit)
                    self.add(unit.name, *made)
                bar.update(task, advance=work[unit.name])
        if crew.first:
            crew.wait(lambda: all(self.has(unit.name) for unit in units))

    def read(self, unit: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return a finished unit's tensors and notes."""
        file = self._file(unit)
        return safetensors.torch.load_file(file), read_notes(file)

    def done(self, units: Sequence[Unit[Row]], work: Mapping[str, int]) -> str:
        """Return a text on how much of the work is finished; "" if nothing is."""
        calls = sum(work[unit.name] for unit in units if self.has(unit.name))
        return f", {calls} of them already finished" if calls else ""

    def gathered(self, units: Sequence[Unit[Row]]) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Join the units of one row: tensors (prompts, seeds, ...), and mean notes."""
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
        """Remove all units, since the run is complete."""
        _clear(self.folder)
