"""`steer.finetune`: tune the adapters of a flow map by a reward, in one call.

The recipe of a run: probe the temperature, put adapters on, run Lightning's loop with the
instruments on, and at the end draw the front of reward against drift by a sweep of the adapters'
scale. A run that stopped goes on from its last checkpoint when it is called again.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steer.adapters.store import WEIGHTS

if TYPE_CHECKING:
    pass

__all__ = []


def _claim(out: Path, identity: Mapping[str, Any], overwrite: bool) -> None:
    """Make the run's folder, or go on with the run that is in it if it is the same one.

    Raises:
        FileExistsError: it is another one.
    """
    from steer.files import write_atomically

    file = out / "run.json"
    content = json.dumps(identity, indent=1, ensure_ascii=False)
    if overwrite and out.exists():
        shutil.rmtree(out)
    if not file.exists():
        if out.exists() and any(out.iterdir()):
            raise FileExistsError(
                f"{out} exists already and holds no tuning run: choose another folder, or say "
                "overwrite (--overwrite on the command line) to replace it"
            )
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(file, content.encode())
        return
    before, now = json.loads(file.read_text(encoding="utf-8")), json.loads(content)
    changed = [k for k in now if before.get(k) != now[k]]
    kept = ("checkpoints/last.ckpt", "finished.json", WEIGHTS)
    if changed and not any((out / name).exists() for name in kept):  # it never got anywhere
        shutil.rmtree(out)
        return _claim(out, identity, overwrite)
    if changed:
        was = "; ".join(f"{k}: {_short(before.get(k))} -> {_short(now[k])}" for k in changed)
        raise FileExistsError(
            f"{out} holds a run that was begun otherwise ({was}): choose another folder, give the "
            "same arguments to go on with it, or say overwrite to drop it"
        )


def _earlier(out: Path | None, name: str, overwrite: bool) -> Any:
    """Return what the run in this folder was begun with, None where there is none to go on."""
    file = None if out is None or overwrite else out / "run.json"
    if file is None or not file.exists():
        return None
    return json.loads(file.read_text(encoding="utf-8")).get(name)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) < 60 else text[:57] + "..."
