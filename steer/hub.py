"""Names on the model hub, `hf://owner/name[@revision][/file]`: the local cache is tried first.

Files in huggingface_hub's cache are used as they are; missing ones are fetched. So a resumed run
uses the files that it started with, and needs no network. `hf download owner/name` fetches newer
files.
"""

import errno
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

__all__ = [
    "Named",
    "among",
    "cached",
    "commit",
    "errors_of",
    "explained",
    "file_of",
    "folder_with",
    "is_hub_id",
    "listing",
    "lora_of",
    "lora_path",
    "named",
    "unreached",
]

_ID = r"[\w-][\w.-]*/[\w-][\w.-]*"
_NAME = re.compile(
    rf"hf:/{{1,2}}(?P<repo>{_ID})(@(?P<revision>refs/[\w-]+/[\w.-]+|[\w.-]+))?(/(?P<file>.+))?"
)
LORAS = ("adapter_config.json", "adapter_model.safetensors"), ("pytorch_lora_weights.safetensors",)
"""Files that identify a repository of adapters: peft's, diffusers'."""


OF_DISKS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
"""Numbers of errors that a connection never has."""

OF_FILES = OF_DISKS | {errno.EACCES, errno.EPERM}
"""Numbers of errors of files; a firewall gives the last two as well, without a file's name."""


class Named(NamedTuple):
    """The parts of a hub name.

    Attributes:
        repo: owner/name.
        revision: a branch, a tag or a commit; None: the main branch.
        file: a file in the repository; "": none.
    """

    repo: str
    revision: str | None = None
    file: str = ""

    def __str__(self) -> str:
        at = f"@{self.revision}" if self.revision else ""
        return f"hf://{self.repo}{at}" + (f"/{self.file}" if self.file else "")


def is_hub_id(name: str) -> bool:
    """Return whether a text looks like a repository of the hub, owner/name.

    >>> is_hub_id("stabilityai/sdxl-turbo"), is_hub_id("./folder"), is_hub_id("a/b/c")
    (True, False, False)
    """
    return re.fullmatch(_ID, name) is not None


def named(text: Any) -> Named | None:
    """Parse a text with `hf://`; None if it does not start with that.

    >>> named("hf://stabilityai/sdxl-turbo@main")
    Named(repo='stabilityai/sdxl-turbo', revision='main', file='')
    >>> named("stabilityai/sdxl-turbo") is None
    True

    Args:
        text: a text, or a path, in which the double slash has become a single one.

    Raises:
        ValueError: it starts with `hf://` but names no repository.
    """
    if not isinstance(text, str | os.PathLike):
        return None
    name = os.fspath(text)
    if not name.startswith("hf:/"):
        return None
    found = _NAME.fullmatch(name)
    if found is None or (found["file"] and ".." in Path(found["file"]).parts):
        raise ValueError(
            f"{name!r} names no repository of the hub: write hf://owner/name, "
            "hf://owner/name@revision, or hf://owner/name/file.safetensors"
        )
    return Named(found["repo"], found["revision"], found["file"] or "")


def cached(name: Named, *files: str) -> Path | None:
    """Return the folder of a cached snapshot that has one of these files, or None."""
    from huggingface_hub import try_to_load_from_cache

    for file in files:
        found = try_to_load_from_cache(name.repo, file, revision=name.revision)
        if isinstance(found, str):
            return Path(found).parents[len(Path(file).parts) - 1]
    return None


def commit(name: Named, *files: str) -> str | None:
    """Return the commit whose files are used; None if neither the cache nor the hub gives it.

    Args:
        name: the repository.
        files: files that identify a snapshot in the cache.
    """
    folder = cached(name, *files)
    if folder is not None:
        return folder.name
    from huggingface_hub import HfApi

    try:
        return HfApi().model_info(name.repo, revision=name.revision, timeout=10).sha
    except unreached(ValueError):  # the loader reports what is wrong
        return None


def file_of(name: Named, file: str) -> Path:
    """Return a file's path in the cache; it is fetched if it is missing.

    Raises:
        FileNotFoundError: the repository has no such file.
        ConnectionError: it is not in the cache, and the hub cannot be reached or denies access.
    """
    folder = cached(name, file)
    if folder is not None:
        return folder / file
    from huggingface_hub import errors, hf_hub_download

    try:
        return Path(hf_hub_download(name.repo, file, revision=name.revision))
    except unreached(ValueError) as error:
        chain = errors_of(error)
        missing = among(chain, errors.EntryNotFoundError)
        if missing and not among(chain, errors.LocalEntryNotFoundError):
            raise FileNotFoundError(f"{name} has no {file}: look at {page(name.repo)}") from None
        raise explained(error, name.repo, file) from error


def folder_with(name: Named, *files: str) -> Path:
    """Return the folder of a repository with all of these files; missing ones are fetched.

    All are of the same commit as the first.

    Raises:
        FileNotFoundError: the repository has no such file.
        ConnectionError: as for `file_of`.
    """
    folder = file_of(name, files[0]).parents[len(Path(files[0]).parts) - 1]
    for file in files[1:]:
        file_of(name._replace(revision=folder.name), file)
    return folder


def listing(name: Named) -> list[str]:
    """Return the names of all files of a repository, from the hub.

    Raises:
        ConnectionError: the hub cannot be reached, or denies access.
    """
    from huggingface_hub import HfApi

    try:
        return list(HfApi().list_repo_files(name.repo, revision=name.revision))
    except unreached(ValueError) as error:
        raise explained(error, name.repo, "the names of its files") from error


def lora_path(lora: str | os.PathLike[str]) -> Path:
    """Return the path of a LoRA: the given path, or the local path for its name on the hub.

    Raises:
        FileNotFoundError: as for `lora_of`; so are the other errors.
    """
    found = named(lora)
    return Path(lora) if found is None else lora_of(found)


def lora_of(name: Named) -> Path:
    """Return the folder or the file of a LoRA on the hub; it is fetched if it is missing.

    Raises:
        FileNotFoundError: the repository has no LoRA.
        ValueError: it has several: name one of them, hf://owner/name/FILE.
        ConnectionError: as for `file_of`.
    """
    if name.file:
        return file_of(name, name.file)
    for files in LORAS:
        folder = cached(name, files[-1])
        if folder is not None and all((folder / file).is_file() for file in files):
            return folder
    try:
        there = listing(name)
    except ConnectionError:
        folder = _in_cache(name)
        if folder is None:
            raise
        there = [file.name for file in folder.iterdir()]
    for files in LORAS:
        if set(files) <= set(there):
            return folder_with(name, *files)
    own = [file for file in there if "/" not in file and file.endswith(".safetensors")]
    if len(own) > 1:
        raise ValueError(
            f"{name} holds several LoRA files ({', '.join(own[:6])}): name one of them, as in "
            f"{name}/{own[0]}"
        )
    if not own:
        raise FileNotFoundError(f"{name} holds no LoRA: no .safetensors file is at its top")
    return file_of(name, own[0])


def _in_cache(name: Named) -> Path | None:
    """Return the cached folder of a repository, complete or not; None if nothing is cached."""
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(name.repo, revision=name.revision, local_files_only=True)
    except (OSError, ValueError):
        return None
    return Path(found)


# ------------------------------------------------------------------ what goes wrong


def unreached(*more: type[Exception]) -> tuple[type[Exception], ...]:
    """Return the errors with which huggingface_hub reports that something is not available.

    If its HTTP client is httpx, that client's errors are not `OSError`s.

    Args:
        more: further errors to return with them.
    """
    from huggingface_hub.errors import HfHubHTTPError

    clients = [kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError"]
    return OSError, *clients, *more


def page(repo: str) -> str:
    """Return the web page of a repository."""
    return f"https://huggingface.co/{repo}"


def errors_of(error: BaseException | None) -> list[BaseException]:
    """Return an error and its causes."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def among(chain: Iterable[BaseException], *kinds: type[BaseException]) -> bool:
    """Return whether any of the errors is of one of these kinds."""
    return any(isinstance(error, kinds) for error in chain)


def explained(error: Exception, repo: str, wanted: str | Sequence[str]) -> Exception:
    """Return an error that says what to do about files that could not be fetched from the hub.

    Args:
        error: the error of huggingface_hub, or one caused by it.
        repo: owner/name.
        wanted: what is missing in the cache.
    """
    from huggingface_hub import constants, errors

    chain = errors_of(error)
    system = (e for e in chain if isinstance(e, OSError))
    local = next((e for e in system if e.errno in (OF_FILES if e.filename else OF_DISKS)), None)
    if local is not None:
        return OSError(
            local.errno,
            f"{repo} could not be written into {constants.HF_HUB_CACHE} ({local.strerror}): make "
            "room, or give another place by the environment variable HF_HOME",
        )
    if among(chain, errors.HFValidationError):
        return ValueError(f"{repo!r} is not the name of a repository ({_first(error)})")
    if among(chain, errors.GatedRepoError):
        return ConnectionError(
            f"{repo} is gated: accept its licence at {page(repo)}, log in with `hf auth login`, "
            "and try again"
        )
    if among(chain, errors.RevisionNotFoundError):
        return ConnectionError(
            f"{repo} has no such revision: look at {page(repo)}/commits for branches, tags and "
            "commits"
        )
    if among(chain, errors.RepositoryNotFoundError):
        return ConnectionError(
            f"the hub has no {repo}, or it is private: look at {page(repo)}, and log in with "
            "`hf auth login` if it is yours"
        )
    return ConnectionError(
        f"{repo} could not be loaded: the hub was not reached ({_first(error)}), and its "
        f"files are not all in {constants.HF_HUB_CACHE}: {wanted}. Connect once, or run "
        f"`hf download {repo} --local-dir DIR` where there is a network and load DIR"
    )


def _first(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
