"""Open a pipeline from a folder, a single file or the model hub: safetensors weights only."""

import json
import os
import re
from pathlib import Path
from typing import Any

import torch

__all__ = ["is_hub_id", "needs_diffusers", "open_pipeline"]

INDEX, MODULAR = "model_index.json", "modular_model_index.json"


def needs_diffusers() -> Any:
    """Return diffusers.

    Raises:
        ModuleNotFoundError: it is not installed; the message has pip's line.
    """
    try:
        import diffusers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "pipelines need diffusers, which is not installed: pip install 'flowsteer[diffusers]'"
        ) from error
    return diffusers


def is_hub_id(name: str) -> bool:
    """Return whether a text looks like a repository of the hub, owner/name.

    >>> is_hub_id("stabilityai/sdxl-turbo"), is_hub_id("./folder"), is_hub_id("a/b/c")
    (True, False, False)
    """
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None


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
        name: a folder that `save_pretrained` wrote, a .safetensors file, or a hub's owner/name.
        config: for a single file, the folder or the hub's owner/name of a pipeline of its class.
        pipeline: the pipeline's class, where its files do not say.
        device: where to put it.
        dtype: of its weights. Default: float32 on the CPU, bfloat16 elsewhere.
        variant: of the weights' files, "fp16" for instance.
        revision: of the hub's repository.

    Raises:
        ModuleNotFoundError: diffusers is not installed.
        FileNotFoundError: files that a folder should have; names them.
        ConnectionError: the hub cannot be reached, or does not let us in.
        ValueError: no pipeline, or one that this release of diffusers does not know.
    """
    diffusers = needs_diffusers()
    kind = dtype or (torch.float32 if _on_cpu(device) else torch.bfloat16)
    path = Path(name)
    try:
        if path.is_file():
            pipe = _from_file(diffusers, path, config, pipeline, kind)
        elif path.is_dir():
            _check_folder(path, variant)
            pipe = _from_folder(diffusers, path, kind, variant)
        else:
            options = {"variant": variant, "revision": revision, "dtype": kind}
            pipe = _from_hub(diffusers, str(name), options)
    except OSError as error:
        raise _explained(error, str(name)) from error
    return pipe if device is None else pipe.to(device)


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
    name = pipeline or str(diffusers.DiffusionPipeline.load_config(config).get("_class_name"))
    chosen = _class(diffusers, name, f"config {config}")
    if not hasattr(chosen, "from_single_file"):
        raise ValueError(f"{name} cannot be read from a single file: give the pipeline's folder")
    local = Path(config).is_dir()
    return chosen.from_single_file(
        str(file), config=str(config), dtype=dtype, **({"local_files_only": True} if local else {})
    )


def _from_folder(diffusers: Any, folder: Path, dtype: torch.dtype, variant: str | None) -> Any:
    if (folder / MODULAR).is_file():
        return _modular(diffusers, str(folder), dtype)
    return diffusers.DiffusionPipeline.from_pretrained(
        str(folder), dtype=dtype, variant=variant, use_safetensors=True, local_files_only=True
    )


def _from_hub(diffusers: Any, name: str, options: dict[str, Any]) -> Any:
    from huggingface_hub.errors import EntryNotFoundError

    options = {k: v for k, v in options.items() if v is not None}
    try:
        diffusers.DiffusionPipeline.load_config(name, **_revision(options))
    except OSError as error:
        if not any(isinstance(e, EntryNotFoundError) for e in _chain(error)) or any(
            type(e).__name__ == "LocalEntryNotFoundError" for e in _chain(error)
        ):
            raise
        return _modular(diffusers, name, options["dtype"], **_revision(options))
    return diffusers.DiffusionPipeline.from_pretrained(name, use_safetensors=True, **options)


def _revision(options: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in options.items() if k == "revision"}


def _modular(diffusers: Any, name: str, dtype: torch.dtype, **options: Any) -> Any:
    """Load a modular pipeline without the language model that rewrites prompts.

    A prompt then means what the user wrote, and gigabytes are saved.
    """
    blocks = diffusers.ModularPipeline.from_pretrained(name, **options).blocks
    blocks.sub_blocks.pop("prompt_upsampler", None)
    pipe = blocks.init_pipeline(name, **options)
    pipe.load_components(dtype=dtype)
    return pipe


def _class(diffusers: Any, name: str, where: str) -> Any:
    found = getattr(diffusers, name, None)
    if not (isinstance(found, type) and hasattr(found, "from_pretrained")):
        raise ValueError(
            f"{where} names the class {name!r}, which diffusers {diffusers.__version__} does not "
            "have as a pipeline: take a release that has it, or name another with pipeline="
        )
    return found


def _check_folder(folder: Path, variant: str | None) -> None:
    """Refuse a folder that is no pipeline, or not a whole one, before anything is read of it."""
    index = next((folder / f for f in (INDEX, MODULAR) if (folder / f).is_file()), None)
    if index is None:
        raise ValueError(
            f"{folder} is not a pipeline: it has no {INDEX}"
            + _part_of_pipeline(folder)
            + "; give the folder that pipe.save_pretrained wrote"
        )
    parts: dict[str, Any] = json.loads(index.read_text(encoding="utf-8"))
    _class(needs_diffusers(), str(parts.get("_class_name")), str(index))
    missing: list[str] = []
    pickled: list[str] = []
    for name, said in parts.items():
        kind = said[1] if isinstance(said, list) and len(said) > 1 else None
        if name.startswith("_") or kind is None or index.name == MODULAR:
            continue
        part = folder / name
        if not part.is_dir():
            missing.append(f"{name}/")
        elif re.search("Model|Encoder|Transformer|Autoencoder|Checker|UNet", kind):
            files = [p.name for p in part.glob("*.safetensors")]
            others = [p.name for p in (*part.glob("*.bin"), *part.glob("*.ckpt"))]
            if not files:
                found = f"{name}/{others[0] if others else '*.safetensors'}"
                (pickled if others else missing).append(found)
            elif variant not in (there := set(map(_variant, files))):
                wanted = f"variant {variant!r}" if variant else "weights without a variant"
                has = ", ".join(f"variant={v!r}" if v else "none" for v in there)
                missing.append(f"{name}/ ({wanted}; what it has: {has})")
    if pickled:
        raise ValueError(
            f"{folder} has pickled weights, which can run code when they are read: "
            f"{', '.join(pickled)}. Save the pipeline again with safe_serialization=True"
        )
    if missing:
        raise FileNotFoundError(
            f"{folder} is incomplete: {', '.join(missing)} missing. Copy it again, or save the "
            "pipeline with pipe.save_pretrained"
        )


def _variant(file: str) -> str | None:
    """Return the variant in a weights file's name.

    >>> _variant("model.fp16.safetensors"), _variant("model-00001-of-00002.safetensors")
    ('fp16', None)
    """
    found = re.search(r"\.([a-z]\w*)(-\d+-of-\d+)?\.safetensors$", file)
    return found and found[1]


def _part_of_pipeline(folder: Path) -> str:
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["_class_name"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return f"; it holds a {kind}, which is one part of a pipeline"


def _chain(error: BaseException | None) -> list[BaseException]:
    """Return an error and those that it came from."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def _explained(error: OSError, name: str) -> Exception:
    """Return what a user can do about a model that could not be had from the hub."""
    from huggingface_hub import constants, errors, try_to_load_from_cache

    chain, page = _chain(error), f"https://huggingface.co/{name}"

    def among(*kinds: type[BaseException]) -> bool:
        return any(isinstance(e, kinds) for e in chain)

    if Path(name).exists():
        known = isinstance(error, FileNotFoundError)
        return error if known else ValueError(f"{name} could not be loaded: {error}")
    if among(errors.GatedRepoError):
        return ConnectionError(
            f"{name} is gated: accept its licence at {page}, log in with `hf auth login`, and try "
            "again"
        )
    if among(errors.RepositoryNotFoundError):
        return ConnectionError(
            f"the hub has no {name}, or it is private: look at {page}, and log in with "
            "`hf auth login` if it is yours"
        )
    if among(errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, OSError):
        cached = try_to_load_from_cache(name, INDEX) if is_hub_id(name) else None
        wanted = f"{INDEX} and the folders that it names"
        if isinstance(cached, str):
            try:
                _check_folder(Path(cached).parent, None)
            except (FileNotFoundError, ValueError) as part:
                wanted = str(part)
        return ConnectionError(
            f"{name} could not be loaded: the hub was not reached ({_first(error)}), and its "
            f"files are not all in {constants.HF_HUB_CACHE}: {wanted}. Connect once, or run "
            f"`hf download {name} --local-dir DIR` where there is a network and load DIR"
        )
    return error


def _first(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
