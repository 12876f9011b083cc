"""What the page may read and write: run folders below the one that it was started with."""

import re
from pathlib import Path

__all__ = ["inside", "inside_quietly", "plain_reward", "runs_in"]

FOREIGN = re.compile(r"[/\\~]|\.\.|[A-Za-z_]\.[A-Za-z_]|\b(url|image|mask)\s*=")
"""What a reward's text has when it names a file, a module or a server."""

NAMED = re.compile(r"\b(?:model|weights|names|head|folder)\s*=\s*['\"]?([^,+)\s'\"]+)")
"""An option that takes a file or a folder, or a name that means none: `head=v2`."""


def inside(root: Path, name: str) -> Path:
    """Return a place below a folder.

    Raises:
        ValueError: no name, or one that leads out of the folder, through a link too.
    """
    if not name.strip():
        raise ValueError("give the folder a name")
    place = (root / name.strip()).resolve()
    if not place.is_relative_to(root.resolve()) or place == root.resolve():
        raise ValueError(f"{name!r} is not inside {root}: give a name below it, without ..")
    return place


def plain_reward(text: str, allow_files: bool) -> str:
    """Return a reward's text, where the page may load it.

    Raises:
        ValueError: none, or one that reads files, runs code or asks a server, while that was not
            allowed at the start.
    """
    if not text.strip():
        raise ValueError("say which reward: clip, or 0.7*clip + 0.3*colour:name=red")
    here = any(Path(value).exists() for value in NAMED.findall(text))
    if not allow_files and (here or FOREIGN.search(text)):
        raise ValueError(
            f"the reward {text!r} names a file, a module or a server, which this page may not "
            "load: start it with `steer studio --allow-files true`, or take named rewards"
        )
    return text.strip()


def runs_in(root: Path) -> list[str]:
    """Return the run folders below a folder, newest first, as names in it.

    Those of `steer sample` and the like have a config.yaml, those of `steer finetune` a run.json.
    """
    files = [f for name in ("config.yaml", "run.json") for f in root.glob(f"**/{name}")]
    found = list(dict.fromkeys(f.parent for f in files if inside_quietly(root, f)))
    found.sort(key=lambda folder: folder.stat().st_mtime, reverse=True)
    return [str(folder.relative_to(root)) for folder in found if folder != root]


def inside_quietly(root: Path, place: Path) -> bool:
    """Return whether a place is below a folder when links are followed."""
    return place.resolve().is_relative_to(root.resolve())
