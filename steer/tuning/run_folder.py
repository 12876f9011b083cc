"""A tuning run's folder: whose run it is, whether it is finished, where it goes on."""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from steer.adapters.store import WEIGHTS
from steer.files import write_atomically
from steer.objectives.table import RENAMED as RENAMED_OPTIONS
from steer.tuning.settings import RENAMED as RENAMED_SETTINGS

__all__ = ["RunFolder"]


class RunFolder:
    """The folder of one run; nothing is written before `claim`.

    Args:
        path: where it is, or will be.
        overwrite: whether an earlier run in it is dropped.
    """

    def __init__(self, path: Path, overwrite: bool = False) -> None:
        self.path, self.overwrite = path, overwrite

    @property
    def checkpoints(self) -> Path:
        """Where Lightning keeps what a stopped run needs to go on."""
        return self.path / "checkpoints"

    @property
    def last(self) -> Path | None:
        """The last checkpoint, if there is one."""
        file = self.checkpoints / "last.ckpt"
        return file if file.exists() else None

    @property
    def finished(self) -> bool:
        """Whether the run in it came to its end."""
        return (self.path / "finished.json").exists()

    def begun(self) -> dict[str, Any]:
        """Return what the run in it was begun with, in today's names; {} if none is to go on."""
        file = self.path / "run.json"
        if self.overwrite or not file.exists():
            return {}
        return _today(json.loads(file.read_text(encoding="utf-8")))

    def claim(self, identity: Mapping[str, Any]) -> None:
        """Make the folder, or go on with the run that is in it if it is the same one.

        Args:
            identity: what makes the run this one, see `Tuning.identity`.

        Raises:
            FileExistsError: it holds another run, or something else.
        """
        if self.overwrite and self.path.exists():
            shutil.rmtree(self.path)
        before, now = self.begun(), json.loads(json.dumps(identity))
        if not before:
            if self.path.exists() and any(self.path.iterdir()):
                raise FileExistsError(
                    f"{self.path} exists already and holds no tuning run: choose another folder, "
                    "or say overwrite (--overwrite on the command line) to replace it"
                )
            self.path.mkdir(parents=True, exist_ok=True)
            content = json.dumps(identity, indent=1, ensure_ascii=False)
            write_atomically(self.path / "run.json", content.encode())
            return
        old, new = dict(_flat(before)), dict(_flat(now))
        changed = [name for name in new | old if old.get(name) != new.get(name)]
        if not changed:
            return
        kept = (self.last, self.finished, (self.path / WEIGHTS).exists())
        if not any(kept):  # it never got anywhere
            shutil.rmtree(self.path)
            return self.claim(identity)
        was = "; ".join(f"{k}: {_short(old.get(k))} -> {_short(new.get(k))}" for k in changed)
        raise FileExistsError(
            f"{self.path} holds a run that was begun otherwise ({was}): choose another folder, "
            "give the same arguments to go on with it, or say overwrite to drop it"
        )

    def finish(self, ended: Mapping[str, Any]) -> None:
        """Note that the run came to its end, and how."""
        write_atomically(self.path / "finished.json", json.dumps(ended, indent=1).encode())


def _today(identity: dict[str, Any]) -> dict[str, Any]:
    """Return an identity with the names of today for options and settings of earlier ones."""
    renamed = {
        "options": RENAMED_OPTIONS.get(identity.get("objective", ""), {}),
        "settings": RENAMED_SETTINGS,
    }
    return identity | {
        part: {names.get(k, k): v for k, v in identity[part].items()}
        for part, names in renamed.items()
        if part in identity
    }


def _flat(
    identity: Mapping[str, Any], parts: tuple[str, ...] = ("options", "settings")
) -> Iterator:
    """Give each option and setting a name of its own: ("settings.rank", 4)."""
    for name, value in identity.items():
        if name in parts:
            yield from ((f"{name}.{k}", v) for k, v in value.items())
        else:
            yield name, value


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) < 60 else text[:57] + "..."
