"""Files that the page may access: run folders below the folder that it was started with."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["inside", "inside_quietly", "plain_method", "plain_reward", "runs_in"]

WORD = re.compile(r"[\w-]+")
"""The form of a name of a reward or a method, unlike that of a file, module or server."""

FILES = ("://", ".py:")
"""Parts of a text by which a reward is a server's or a file's, wherever they stand."""


def inside(root: Path, name: str) -> Path:
    """Return a path below a folder.

    Raises:
        ValueError: an empty name, or one that leads out of the folder, also through a link.
    """
    if not name.strip():
        raise ValueError("give the folder a name")
    place = (root / name.strip()).resolve()
    if not place.is_relative_to(root.resolve()) or place == root.resolve():
        raise ValueError(f"{name!r} is not inside {root}: give a name below it, without ..")
    return place


def plain_reward(text: str, allow_files: bool) -> str:
    """Return a reward's text if the page may load it.

    Raises:
        ValueError: it is empty, or it reads files, runs code or contacts a server although that
            was not allowed at the start.
    """
    if not text.strip():
        raise ValueError("say which reward: clip, or 0.7*clip + 0.3*colour:name=red")
    if not allow_files:
        from rewards.loading import read  # loads torch, for which the page does not wait

        def check(name: str | None, options: Mapping[str, Any]) -> None:
            named = name is None or (WORD.fullmatch(name) and name != "remote")
            if not named or not all(_plain_option(*one) for one in options.items()):
                raise ValueError(
                    f"the reward {text!r} names a file, a module or a server, which this page may "
                    "not load: start it with `steer studio --allow-files true`, or take named "
                    "rewards"
                )

        for part in FILES:  # the loader looks for these before it looks for names
            if part in text:
                check(part, {})
        read(text, check)
    return text.strip()


def plain_method(text: str, allow_files: bool) -> str:
    """Return a method's text if the page may run it.

    Raises:
        ValueError: it names a file of code although that was not allowed at the start.
    """
    named = WORD.fullmatch(text.partition(":")[0].strip()) and ".py:" not in text
    if not allow_files and not named:
        raise ValueError(
            f"the method {text!r} is from a file, whose code would be run: start the page with "
            "--allow-files true"
        )
    return text


def _plain_option(key: str, value: Any) -> bool:
    """Return whether an option of a reward is a number or a known word, not a resource."""
    from rewards.trust import PLAIN, is_plain

    if key in PLAIN or not isinstance(value, str | list | dict):
        return True
    return key == "head" and is_plain(value)


def runs_in(root: Path) -> list[str]:
    """Return the run folders below a folder, newest first, as relative names.

    Those of `steer sample` and similar commands have a config.yaml, those of `steer finetune` a
    run.json.
    """
    files = [f for name in ("config.yaml", "run.json") for f in root.glob(f"**/{name}")]
    found = list(dict.fromkeys(f.parent for f in files if inside_quietly(root, f)))
    found.sort(key=lambda folder: folder.stat().st_mtime, reverse=True)
    return [str(folder.relative_to(root)) for folder in found if folder != root]


def inside_quietly(root: Path, place: Path) -> bool:
    """Return whether a path is below a folder after following links."""
    return place.resolve().is_relative_to(root.resolve())
