"""A tuning run's folder: which run it contains, whether it is finished, where to resume."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from steer.adapters.store import WEIGHTS
from steer.files import expanded, refuse_existing, tidy, write_atomically
from steer.identity import changes
from steer.lock import locked
from steer.objectives.table import RENAMED as RENAMED_OPTIONS
from steer.training.checkpoints import kept, usable
from steer.tuning.settings import RENAMED as RENAMED_SETTINGS

__all__ = ["RunFolder"]


class RunFolder:
    """The folder of one run; nothing is written before `claim`.

    Args:
        path: path of the folder, which need not exist; `~` is the home folder.
        overwrite: whether an earlier run in it is deleted when the new one has saved something.
    """

    def __init__(self, path: str | os.PathLike[str], overwrite: bool = False) -> None:
        self.path, self.overwrite = expanded(path), overwrite
        place = self.path.resolve()
        self._before = place.with_name(f".{place.name}.before")

    @property
    def checkpoints(self) -> Path:
        """The folder of Lightning's checkpoints, from which a run resumes."""
        return self.path / "checkpoints"

    @property
    def finished(self) -> bool:
        """Whether the run in it is finished."""
        return (self.path / "finished.json").exists()

    @property
    def whole(self) -> bool:
        """Whether the run in it has saved something: a checkpoint, or its end."""
        return self.finished or bool(kept(self.checkpoints)) or (self.path / WEIGHTS).exists()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Lock the folder while the block runs, and clean up before and after it.

        A run that was to be replaced is restored if the new run ended, or was killed, before it
        had saved anything.

        Raises:
            BlockingIOError: another process writes to the folder.
            FileExistsError: `overwrite` is set, and the folder contains files that no run of this
                package wrote.
        """
        with locked(self.path):
            self._put_back()
            if self.overwrite:
                refuse_existing(self.path, True, held=True)
            try:
                yield
            finally:
                self._put_back()

    def begun(self) -> dict[str, Any]:
        """Return the settings of the run in it; {} if there is no run to resume."""
        file = self.path / "run.json"
        if self.overwrite or not file.exists():
            return {}
        try:
            return _today(json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, AttributeError) as error:
            raise ValueError(
                f"{file} is damaged ({error}): copy it back, give another folder, or set "
                "overwrite to start again"
            ) from None

    def claim(self, identity: Mapping[str, Any]) -> str:
        """Create the folder, or resume the run in it if it is the same run.

        A run may be made longer: if only `steps` differs and has grown, the run continues,
        finished or not.

        Args:
            identity: the values that identify the run, see `Tuning.identity`.

        Returns:
            A message about it; nothing for a new run or the same one.

        Raises:
            FileExistsError: it holds another run, or something else.
        """
        before, now = self.begun(), json.loads(json.dumps(identity))
        if self.overwrite and self.path.exists():
            os.replace(self.path.resolve(), self._before)
        if not before:
            if self.path.exists():
                tidy(self.path)
            if self.path.exists() and any(self.path.iterdir()):
                raise FileExistsError(
                    f"{self.path} exists already and contains no tuning run: choose another folder"
                )
            self._begin(identity)
            return ""
        tidy(self.path)
        for part in ("sources", "watched", "start"):
            if part not in before:  # started by a version that did not record it
                now.pop(part, None)
        changed = changes(before, now)
        if not changed:
            return ""
        if set(changed) == {"steps"} and now["steps"] > before["steps"]:
            (self.path / "finished.json").unlink(missing_ok=True)
            self._begin(identity)
            return f"{self.path} continues: {changed['steps']} steps"
        if not self.whole:  # it has not saved anything
            refuse_existing(self.path, True, held=True)
            shutil.rmtree(self.path)
            self._begin(identity)
            return ""
        was = "; ".join(f"{name}: {both}" for name, both in changed.items())
        edited = {n.partition("sources.")[0] for n in changed if ".sources." in f".{n}"}
        whose = {"": "the reward's", "watched.": "the judge's or a held-out reward's"}
        longer = (
            " (only steps may grow, and nothing else may change)" if "steps" in changed else ""
        )
        raise FileExistsError(
            f"{self.path} contains a run with other arguments ({was})"
            + "".join(f": a file of {whose[part]} was edited since" for part in sorted(edited))
            + (
                f": choose another folder, give the same arguments to resume it{longer}, or set "
                "overwrite to delete it"
            )
        )

    def keep(self) -> None:
        """Note that the run has saved something: the run that it replaces is deleted."""
        shutil.rmtree(self._before, ignore_errors=True)

    def left(self) -> str:
        """Return what an interrupted run has saved, and how to resume it."""
        found = usable(self.checkpoints) if self.whole else None
        if found is None:
            return f"stopped, unfinished: {self.path} has nothing yet to resume from"
        again = " without overwrite" if self.overwrite else ""
        return (
            f"stopped, unfinished: run the same command again{again} to resume. {self.path} has "
            f"the state after step {found[1]} and the last saved adapters"
        )

    def finish(self, ended: Mapping[str, Any]) -> None:
        """Note that the run is finished, with its results."""
        write_atomically(self.path / "finished.json", json.dumps(ended, indent=1).encode())
        self.keep()

    def _begin(self, identity: Mapping[str, Any]) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        content = json.dumps(identity, indent=1, ensure_ascii=False)
        write_atomically(self.path / "run.json", content.encode())

    def _put_back(self) -> None:
        """Restore a run that was set aside for a new one that has not saved anything."""
        if not self._before.exists():
            return
        if not self.whole:
            if self.path.exists():
                shutil.rmtree(self.path)
            os.replace(self._before, self.path.resolve())
            print(f"{self.path}: the earlier run was restored")
        self.keep()


def _today(identity: dict[str, Any]) -> dict[str, Any]:
    """Return an identity with earlier names of options and settings replaced by current ones."""
    renamed = {
        "options": RENAMED_OPTIONS.get(identity.get("objective", ""), {}),
        "settings": RENAMED_SETTINGS,
    }
    return identity | {
        part: {names.get(k, k): v for k, v in identity[part].items()}
        for part, names in renamed.items()
        if part in identity
    }
