"""Open a pipeline from a folder, a single file or the model hub: safetensors weights only."""

import os
from pathlib import Path
from typing import Any

import torch

from steer import hub
from steer.backends.folders import (
    INDEX,
    MODULAR,
    class_of,
    needs_diffusers,
    only_variant,
    variant_of,
)
from steer.hub import Named, is_hub_id

__all__ = ["open_pipeline"]


def open_pipeline(
    name: str | os.PathLike[str],
    *,
    config: str | os.PathLike[str] | None = None,
    pipeline: str | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    variant: str | None = None,
    revision: str | None = None,
) -> Any:
    """Return a pipeline, with weights read only from safetensors; no code of the hub's is run.

    Args:
        name: a folder that `save_pretrained` wrote, a .safetensors file, or a hub's owner/name,
            hf://owner/name or hf://owner/name@revision, whose files are looked up in the local
            cache first.
        config: for a single file, the folder or the hub's owner/name of a pipeline of its class.
        pipeline: class of the pipeline, if its files do not specify it.
        device: device of the pipeline.
        dtype: dtype of its weights. Default: float32 on the CPU, bfloat16 elsewhere.
        variant: variant of the weights' files, for instance "fp16". Default: none, or the only
            existing one.
        revision: revision of the hub's repository: a branch, a tag or a commit.

    Raises:
        ModuleNotFoundError: diffusers is not installed.
        FileNotFoundError: files that a folder should have; the message names them.
        ConnectionError: the hub cannot be reached, or denies access.
        ValueError: not a pipeline, or one that this release of diffusers does not know.
    """
    diffusers = needs_diffusers()
    kind = dtype or (torch.float32 if _on_cpu(device) else torch.bfloat16)
    path, repository = Path(name), _repository(name, revision)
    try:
        if repository is not None:
            pipe = _from_hub(diffusers, repository, kind, variant)
        elif path.is_file():
            pipe = _from_file(diffusers, path, config, pipeline, kind)
        else:
            pipe = _from_folder(diffusers, path, kind, variant_of(path, variant))
    except hub.unreached() as error:
        raise _explained(error, name, repository) from error
    return pipe if device is None else pipe.to(device)


def _repository(name: str | os.PathLike[str], revision: str | None) -> Named | None:
    """Return the hub repository that a name refers to; None for a folder or a file."""
    found = hub.named(name)
    if found is None:
        if Path(name).exists():
            return None
        found = Named(os.fspath(name))
    if found.file:
        raise ValueError(
            f"{found} names a file: give the pipeline's repository, hf://{found.repo}, or "
            f"download the file (`hf download {found.repo} {found.file}`) and give its path and "
            "config="
        )
    if revision is not None and found.revision not in (None, revision):
        raise ValueError(
            f"{found} says its revision, and revision={revision!r} another: leave one of them out"
        )
    return found._replace(revision=found.revision or revision)


def _on_cpu(device: str | torch.device | None) -> bool:
    return device is None or torch.device(device).type == "cpu"


def _from_file(
    diffusers: Any, file: Path, config: Any, pipeline: str | None, dtype: torch.dtype
) -> Any:
    if file.suffix != ".safetensors":
        raise ValueError(
            f"{file} is not a .safetensors file: other formats can run code when they are read. "
            "Convert it, or take the model's safetensors file"
        )
    if config is None:
        raise ValueError(
            f"{file} contains only weights: give config=, the folder or hub id of a pipeline of "
            "the same class (its tokenizers and configurations), as in "
            'steer.load("model.safetensors", config="stabilityai/stable-diffusion-xl-base-1.0")'
        )
    found = hub.named(config)
    options: dict[str, Any] = {}
    if found is not None and found.revision is not None:
        options["revision"] = found.revision
    config = config if found is None else found.repo
    said = diffusers.DiffusionPipeline.load_config(config, **options)
    name = pipeline or str(said.get("_class_name"))
    chosen = class_of(diffusers, name, f"config {config}")
    if not hasattr(chosen, "from_single_file"):
        raise ValueError(f"{name} cannot be read from a single file: give the pipeline's folder")
    if Path(config).is_dir():
        options["local_files_only"] = True
    return chosen.from_single_file(str(file), config=str(config), dtype=dtype, **options)


def _from_folder(
    diffusers: Any, folder: Path, dtype: torch.dtype, variant: str | None, name: str | None = None
) -> Any:
    """Load a folder without holding any weights in memory twice.

    Args:
        diffusers: the package.
        folder: folder of the pipeline.
        dtype: of the weights.
        variant: variant of their files.
        name: name of the pipeline. Default: the folder.
    """
    if (folder / MODULAR).is_file():
        return _modular(diffusers, str(folder), dtype)
    pipe = diffusers.DiffusionPipeline.from_pretrained(
        str(folder), dtype=dtype, variant=variant, use_safetensors=True, local_files_only=True,
        low_cpu_mem_usage=True,
    )  # fmt: skip
    if name is not None:
        pipe.register_to_config(_name_or_path=name)
    return pipe


def _from_hub(diffusers: Any, name: Named, dtype: torch.dtype, variant: str | None) -> Any:
    """Load a repository's pipeline, from the cache if it is complete there."""
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    folder = hub.cached(name, INDEX)
    if folder is not None:
        try:
            return _from_folder(diffusers, folder, dtype, variant_of(folder, variant), name.repo)
        except FileNotFoundError:
            # the commit of the cache, so that commits are not mixed
            name = name._replace(revision=folder.name)
    revision = {} if name.revision is None else {"revision": name.revision}
    if folder is None:
        try:
            diffusers.DiffusionPipeline.load_config(name.repo, **revision)
        except hub.unreached() as error:
            chain = hub.errors_of(error)
            if not hub.among(chain, EntryNotFoundError) or hub.among(
                chain, LocalEntryNotFoundError
            ):
                raise
            return _modular(diffusers, name.repo, dtype, **revision)
    variant = variant or only_variant(hub.listing(name))
    folder = Path(
        diffusers.DiffusionPipeline.download(
            name.repo, use_safetensors=True, variant=variant, **revision
        )
    )
    return _from_folder(diffusers, folder, dtype, variant_of(folder, variant), name.repo)


def _modular(diffusers: Any, name: str, dtype: torch.dtype, **options: Any) -> Any:
    """Load a modular pipeline without the language model that rewrites prompts.

    A prompt then means what the user wrote, and gigabytes are saved.
    """
    blocks = diffusers.ModularPipeline.from_pretrained(name, **options).blocks
    blocks.sub_blocks.pop("prompt_upsampler", None)
    pipe = blocks.init_pipeline(name, **options)
    pipe.load_components(dtype=dtype, use_safetensors=True)
    return pipe


def _explained(error: Exception, what: Any, name: Named | None) -> Exception:
    """Return an error that says what to do about a model that could not be loaded."""
    if name is None:
        known = isinstance(error, FileNotFoundError)
        return error if known else ValueError(f"{what} could not be loaded: {error}")
    if isinstance(error, ConnectionError) and not error.errno:  # it is already explained
        return error
    wanted = f"{INDEX} and the folders that it names"
    folder = hub.cached(name, INDEX) if is_hub_id(name.repo) else None
    if folder is not None:
        try:
            variant_of(folder, None)
        except (FileNotFoundError, ValueError) as part:
            wanted = str(part)
    return hub.explained(error, name.repo, wanted)
