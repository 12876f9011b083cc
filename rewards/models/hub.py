"""Where a reward's weights come from: your own folder, the hub's cache, the hub."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from torch import Tensor

from rewards.trust import refuse_fetch
from steer.reward import reason

__all__ = ["File", "Source", "fetch", "fetch_url", "folder_of", "home", "local", "state"]


@dataclass(frozen=True)
class Source:
    """Published weights.

    Attributes:
        repo: the hub's repository, org/name.
        files: the files of it that are needed.
        licence: licence of the weights, as stated on their page.
        size: size of the download, as text.
        page: its web page. Default: the hub's.
    """

    repo: str
    files: tuple[str, ...]
    licence: str = ""
    size: str = ""
    page: str = ""

    def __post_init__(self) -> None:
        if not self.page:
            object.__setattr__(self, "page", f"https://huggingface.co/{self.repo}")

    @property
    def here(self) -> Path | None:
        """Where it is on this machine, or None."""
        return local(self)

    @property
    def place(self) -> str:
        """What to put where by hand."""
        size = f" ({self.size})" if self.size else ""
        return f"{', '.join(self.files)}{size} from {self.page} into {home() / self.repo}"


@dataclass(frozen=True)
class File:
    """One published file with its own address.

    Attributes:
        url: the address.
        licence: licence of the weights, as stated on their page.
        size: size of the download, as text.
    """

    url: str
    licence: str = ""
    size: str = ""

    @property
    def cached(self) -> Path:
        """The path at which torch caches it."""
        from torch import hub

        return Path(hub.get_dir()) / "checkpoints" / self.name

    @property
    def name(self) -> str:
        """The file's name."""
        return unquote(self.url.rsplit("/", 1)[-1])

    @property
    def here(self) -> Path | None:
        """Where it is on this machine, or None."""
        return next((p for p in (self.cached, home() / self.name) if p.is_file()), None)

    @property
    def place(self) -> str:
        """What to put where by hand."""
        return f"{self.url} at {self.cached}"


def home() -> Path:
    """Return the folder for weights that were downloaded by hand.

    `$FLOWSTEER_HOME`, or `flowsteer` in `$XDG_CACHE_HOME` (`~/.cache` where that is not set).
    """
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("FLOWSTEER_HOME") or Path(cache) / "flowsteer")


def local(source: Source) -> Path | None:
    """Return the local folder with all files of a source, or None; the hub is not contacted."""
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
    """Return the folder that holds all files of a source; missing files are downloaded.

    Args:
        source: the weights.
        reward: the reward's name, for the message.
        option: its option that takes a path instead.

    Raises:
        ValueError: they are not here and the hub cannot be reached; the message says
            what to download and where to put it.
    """
    folder = local(source)
    if folder is not None:
        return folder
    refuse_fetch(reward, source.repo)
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(source.repo, allow_patterns=list(source.files)))
        lacking = [name for name in source.files if not (folder / name).is_file()]
        if lacking:  # an outdated copy, or files that the repository lacks
            raise FileNotFoundError(f"the download lacks {', '.join(lacking)}")
        return folder
    except Exception as error:
        raise ValueError(
            f"the weights of {reward!r} are not on this machine, and {source.repo} cannot be "
            f"downloaded from the hub ({type(error).__name__}: {reason(error)}). Download "
            f"{source.place}, or give their location: {reward}:{option}=PATH"
        ) from error


def folder_of(
    model: str | Path | None, default: Source, reward: str, option: str = "model"
) -> Path:
    """Return the folder of a model: the given path, the folder of a hub id, or the default's.

    Raises:
        FileNotFoundError: a path was given that does not exist.
        ValueError: the hub cannot be reached: the message says what to download and where to put
            it.
    """
    if model is None:
        return fetch(default, reward, option)
    text = str(model)
    if Path(text).exists():
        return Path(text)
    if text.startswith((".", "/", "~")) or text.count("/") != 1:
        raise FileNotFoundError(
            f"no {text!r}: {reward}:{option}= takes a folder or file that exists, or a hub id "
            "org/name"
        )
    return fetch(Source(text, default.files), reward, option)


def fetch_url(url: str, reward: str, option: str) -> Path:
    """Return a file of weights that has its own address; it is downloaded if it is missing.

    It is looked for in torch's own cache, `$TORCH_HOME/hub/checkpoints` (`~/.cache/torch` where
    that is not set), and in `home()`.

    Args:
        url: where it is published.
        reward: the reward's name, for the message.
        option: its option that takes a path instead.

    Raises:
        ValueError: it is not here and cannot be downloaded; the message says what to download and
            where to put it.
    """
    from torch import hub

    file = File(url)
    if (path := file.here) is not None:
        return path
    name, cached = file.name, file.cached
    refuse_fetch(reward, name)
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        prefix = re.search(r"-([0-9a-f]{8,})\.\w+$", name)
        hub.download_url_to_file(url, str(cached), prefix[1] if prefix else None, progress=False)
    except Exception as error:
        raise ValueError(
            f"the weights of {reward!r} are not on this machine, and {name} cannot be downloaded "
            f"({type(error).__name__}: {error}). Download {url} and put it at {cached}, or give "
            f"its location: {reward}:{option}=FILE"
        ) from error
    return cached


def state(path: str | Path, reward: str, option: str) -> dict[str, Tensor]:
    """Read a file of weights: safetensors, or a `torch.save` file that holds only tensors.

    Args:
        path: the file.
        reward: the reward's name, for the messages.
        option: its option that named the file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not such a file.
    """
    import safetensors.torch
    import torch

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"no file {str(path)!r}: {reward}:{option}= takes a .safetensors or .pth file of "
            "weights"
        )
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"cannot read the weights {str(path)!r} ({type(error).__name__}: {reason(error)}): "
            f"{reward}:{option}= takes a .safetensors file, or a .pth file with tensors only, "
            "torch.save(model.state_dict(), FILE)"
        ) from error
    if isinstance(found, dict):
        found = found.get("state_dict", found)
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        raise ValueError(
            f"{str(path)!r} contains no named weights: {reward}:{option}= takes what "
            "torch.save(model.state_dict(), FILE) writes"
        )
    return found
