"""Where a reward's weights come from: a folder of one's own, the hub's cache, the hub."""

import os
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Source", "fetch", "home", "local"]


@dataclass(frozen=True)
class Source:
    """Published weights.

    Attributes:
        repo: the hub's repository, org/name.
        files: what is needed of it.
        licence: of the weights, as their page says.
        size: of the download, for people.
    """

    repo: str
    files: tuple[str, ...]
    licence: str = ""
    size: str = ""

    @property
    def page(self) -> str:
        """Where a browser finds it."""
        return f"https://huggingface.co/{self.repo}"


def home() -> Path:
    """Return the folder for weights that were downloaded by hand.

    `$FLOWSTEER_HOME`, or `flowsteer` in `$XDG_CACHE_HOME` (`~/.cache` where that is not set).
    """
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("FLOWSTEER_HOME") or Path(cache) / "flowsteer")


def local(source: Source) -> Path | None:
    """Return the folder that holds all files of a source, without asking a hub; or None."""
    mine = home() / source.repo
    if all((mine / name).is_file() for name in source.files):
        return mine
    from huggingface_hub import try_to_load_from_cache

    found = [try_to_load_from_cache(source.repo, name) for name in source.files]
    if all(isinstance(path, str) for path in found):
        folder = Path(str(found[0]))
        for _ in Path(source.files[0]).parts:
            folder = folder.parent
        return folder
    return None


def fetch(source: Source, reward: str, option: str = "model") -> Path:
    """Return the folder that holds all files of a source, downloaded where they are missing.

    Args:
        source: what is wanted.
        reward: the reward's name, for the message.
        option: its option that takes a path instead.

    Raises:
        ValueError: they are not here and the hub cannot be reached; the message says what to
            download and where to put it.
    """
    folder = local(source)
    if folder is not None:
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source.repo, allow_patterns=list(source.files)))
    except Exception as error:
        files = ", ".join(source.files)
        size = f" ({source.size})" if source.size else ""
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ValueError(
            f"the weights of {reward!r} are not here, and {source.repo} cannot be had from the "
            f"hub ({type(error).__name__}: {reason}). Download {files}{size} from {source.page} "
            f"into {home() / source.repo}, or say where they are: {reward}:{option}=PATH"
        ) from error
