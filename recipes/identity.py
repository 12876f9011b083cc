"""The identity of a run: hashes of its files, versions, and its settings as YAML."""

import hashlib
import json
import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

import rewards
import steer
from steer import hub
from steer.adapters.store import CONFIG, WEIGHTS
from steer.backends.folders import INDEX, MODULAR
from steer.catalogue import MODELS
from steer.identity import file_hash, python_files
from steer.secrets import redacted

__all__ = [
    "adapter_files",
    "config_text",
    "fingerprints",
    "is_made_of",
    "named_files",
    "settings_of",
]


REWARDS = {"held_out", "judge", "reward"}
"""The arguments of commands that are texts of rewards."""


def adapter_files(lora: Path | None) -> list[str]:
    """Return the files that identify the adapters of a run."""
    if lora is None:
        return []
    place = hub.lora_path(lora)
    if place.is_file():
        return [str(place)]
    if (place / CONFIG).is_file():
        return [str(place / name) for name in (CONFIG, WEIGHTS)]
    return [str(file) for file in sorted(place.glob("*.safetensors"))]


def fingerprints(model: str, *names: str) -> dict[str, str]:
    """Return fingerprints that show whether code and weights have changed since an earlier start.

    They are versions, and a hash of each file and folder that the names mention (for large weights
    see `steer.identity.file_hash`) and of the models and rewards of the package. For a repository
    of the hub it is the commit.

    Args:
        model: the model, as given.
        names: rewards, judges and files, as given.
    """
    names = model, *names
    files = [str(file) for file in named_files(*names)]
    zoos = [Path(package.__file__).with_name("zoo") for package in (steer, rewards)]  # type: ignore[type-var, arg-type]
    folders = [Path(name) for name in names if os.path.isdir(name)] + zoos
    files += [str(p) for f in folders for p in sorted(f.rglob("*.safetensors"))]
    files += [str(p) for f in folders for p in sorted(f.rglob("*.json"))]
    prints: dict[str, str] = {"flowsteer": steer.__version__, "torch": str(torch.__version__)}
    for file in dict.fromkeys(files):
        if os.path.isfile(file):
            prints[file] = file_hash(Path(file))
    return prints | _commits(model, *names[1:])


def _commits(model: str, *names: str) -> dict[str, str]:
    """Return the commits of the repositories that are named; only a model may be `owner/name`."""
    found = {name: hub.named(name) for name in (model, *names)}
    if model not in MODELS and not os.path.exists(model) and hub.is_hub_id(model):
        found[model] = hub.Named(model)
    commits = {
        name: hub.commit(one, INDEX, MODULAR, "config.json")
        for name, one in found.items()
        if one is not None
    }
    return {name: sha for name, sha in commits.items() if sha is not None}


def settings_of(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return a command's arguments as plain values for a file, with tokens in rewards hidden."""
    plain = {k: str(hub.named(v) or v) if isinstance(v, Path) else v for k, v in arguments.items()}
    for name in REWARDS & set(plain):
        texts = plain[name]
        if isinstance(texts, str):
            plain[name] = redacted(texts)
        elif texts is not None:
            plain[name] = [redacted(text) for text in texts]
    return plain


def named_files(*names: str) -> list[Path]:
    """Return the files that texts mention, Python files with the neighbours that they import.

    Args:
        names: models, rewards and files, as given.
    """
    words = [w.strip() for name in names for w in [name, *re.split(r"[=,+*()]", name)]]
    code = [path for name in names for path in re.findall(r"[^\s:+*=,()]+\.py", name)]
    files = [near for path in code for near in python_files(Path(path))]
    files += [Path(w) for w in words if w and os.path.isfile(w)]
    return list(dict.fromkeys(files))


def config_text(settings: Mapping[str, Any], identity: Mapping[str, Any] | None = None) -> str:
    """Return the settings as YAML for `--config`, below comments.

    The comments have the versions, and a line by which `is_made_of` recognises the run.

    Args:
        settings: settings of the command.
        identity: what identifies the run: settings, prompts, files, as JSON values.
    """
    versions = f"flowsteer {steer.__version__}, torch {torch.__version__}"
    header = f"# made by: {versions}, Python {platform.python_version()}\n"
    header += "" if identity is None else _made_of(identity)
    kept = {k: v for k, v in settings.items() if v is not None}
    return header + yaml.dump(kept, Dumper=_Quoting, sort_keys=False, allow_unicode=True)


class _Quoting(yaml.SafeDumper):
    """Quote texts like 1e3, too: they are numbers for `--config`, although not in YAML 1.1."""


_Quoting.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"),
    list("-+0123456789"),
)


def is_made_of(folder: Path, identity: Mapping[str, Any] | None = None) -> bool:
    """Return whether a folder's config.yaml was written for a run with this identity.

    Args:
        folder: the run's folder.
        identity: as for `config_text`. None: with any.
    """
    try:
        lines = (folder / "config.yaml").read_text(encoding="utf-8").splitlines(keepends=True)
    except (OSError, ValueError):
        return False
    wanted = _MADE_OF if identity is None else _made_of(identity)
    return any(line.startswith(wanted) for line in lines[:2])


_MADE_OF = "# made of: settings, prompts and files "


def _made_of(identity: Mapping[str, Any]) -> str:
    text = json.dumps(identity, sort_keys=True)
    return f"{_MADE_OF}{hashlib.sha256(text.encode()).hexdigest()}\n"
