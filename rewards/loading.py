"""From a text to a reward: our names, functions of rewards, files, dotted paths, servers."""

import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import nn

from rewards.grammar import arguments, call, terms, written_options
from steer.reward import Reward, hint, unknown, wrap

__all__ = ["FUNCTIONS", "NAMES", "from_file", "load", "missing"]

_TABLE = {
    "clip": (
        "models.clip:Clip",
        "cosine similarity of picture and prompt, by an open_clip model",
    ),
    "colour": ("pixels.colour:Colour", "how near the drawing is to a named colour (name=red)"),
    "brightness": ("pixels.colour:Brightness", "mean luma, from 0 (black) to 1 (white)"),
    "contrast": ("pixels.tone:Contrast", "standard deviation of luma, from 0 to 0.5"),
    "saturation": ("pixels.tone:Saturation", "mean chroma of the drawing, from 0 to 1"),
    "sharpness": ("pixels.tone:Sharpness", "RMS Laplacian of luma, from 0 to 1"),
    "smoothness": ("pixels.tone:Smoothness", "minus the total variation, from -1 to 0"),
    "symmetry": (
        "pixels.form:Symmetry",
        "how alike the halves are, from -1 to 0 (axis=vertical or horizontal)",
    ),
    "antisymmetry": (
        "pixels.form:Antisymmetry",
        "how far the halves are negatives, from 0 to 1 (axis=vertical or horizontal)",
    ),
    "layout": (
        "pixels.form:Layout",
        "share of the ink inside region=left, right, top, bottom, centre, or inside mask=FILE",
    ),
    "similarity": (
        "pixels.reference:Similarity",
        "closeness to the picture image=FILE, from -1 to 0 (by=colour or luma)",
    ),
    "jpeg": ("pixels.jpeg:Jpeg", "minus the size as a JPEG file in kB; no gradient"),
    "siglip": ("models.siglip:Siglip", "cosine of picture and prompt by SigLIP 1 or 2"),
    "pickscore": (
        "models.pickscore:PickScore",
        "which picture people pick for a prompt, about 16 to 26",
    ),
    "hpsv2": (
        "models.hpsv2:HPSv2",
        "which picture people prefer for a prompt, about .2 to .35 (version=2.1 or 2.0)",
    ),
    "imagereward": (
        "models.imagereward:ImageReward",
        "how well people find a picture and its fit to the prompt, about -2.5 to 2.5",
    ),
    "mps": (
        "models.mps:MPS",
        "how people prefer a picture for a prompt under a condition",
    ),
    "aesthetic": (
        "models.aesthetic:Aesthetic",
        "LAION's mark for beauty, about 1 to 10; asks for no prompt",
    ),
    "vqa": (
        "models.vqa:VQA",
        "log-probability of an answer about the picture, by a vision-language model",
    ),
    "classifier": (
        "models.classifier:Classifier",
        "log-probability of a class (model=timm:NAME or torchvision:NAME, target=)",
    ),
    "lpips": ("models.lpips:Lpips", "minus the perceptual distance to image=FILE"),
    "dino": ("models.dino:Dino", "cosine of self-supervised features with those of image=FILE"),
    "remote": ("serving.remote:Remote", "what a server of rewards says (url=http://HOST:PORT)"),
}
NAMES: Mapping[str, str] = MappingProxyType({name: line for name, (_, line) in _TABLE.items()})
"""Name -> one line."""

GROUP = "flowsteer.rewards"
"""The entry-point group in which other packages offer rewards."""

_FUNCTIONS = {
    "min": ("combine.algebra:Minimum", "the least of some rewards (smooth=WIDTH)"),
    "product": ("combine.algebra:Product", "log of the chance that all accept (at=, width=)"),
    "capped": ("combine.algebra:Capped", "a reward that is content with a target (at=, soft=)"),
    "ensemble": ("combine.algebra:Ensemble", "the mean less the disagreement (penalty=)"),
    "normalised": ("combine.normalised:Normalised", "scaled by what the run has seen (decay=)"),
    "augmented": (
        "combine.augment:Augmented",
        "the mean over random crops, flips and noise (views=, crop=, flip=, noise=, seed=)",
    ),
    "batched": ("combine.algebra:Batched", "in micro-batches, for memory (size=)"),
}
FUNCTIONS: Mapping[str, str] = MappingProxyType({k: line for k, (_, line) in _FUNCTIONS.items()})
"""What makes a reward of rewards, as in `min(clip, 2*brightness)`: name -> one line."""

_URL = re.compile(r"https?://\S+")
_FILE = re.compile(r"(?P<file>.+\.py):(?P<name>\w+)(?::(?P<options>.*))?")


def load(spec: str, **options: Any) -> Reward:
    """Make a reward of a text.

    Args:
        spec: a name of `NAMES` ("clip"), with options after a colon ("colour:name=red"), a
            function or class in a file ("file.py:Name") or a module ("pkg.mod.Name"), an entry
            point of another package (group `flowsteer.rewards`), a server's URL
            ("http://127.0.0.1:8000"), a weighted sum of such ("0.7*clip + 0.3*colour:name=red -
            0.1*jpeg"), or one of `FUNCTIONS` of such ("capped(min(clip, brightness), at=0.3)").
        options: more options, for a single reward.

    Raises:
        ValueError: an unknown name or option; the message has the nearest ones.
        FileNotFoundError: no such file.
        TypeError: what was found is not callable.
    """
    parts = list(terms(spec))
    if options and len(parts) > 1:
        raise ValueError(
            f"options {sorted(options)} for the sum {spec!r}: write them into its terms, as in "
            "'0.5*colour:name=red + clip'"
        )
    made = [(weight, _one(text, options)) for weight, text in parts]
    total = made[0][1] if made[0][0] == 1 else made[0][0] * made[0][1]
    for weight, reward in made[1:]:
        total = total + weight * reward
    return total


def missing(name: str) -> list[str]:
    """Return what a reward's default options need that is not on this machine, one line each.

    >>> missing("brightness")
    []

    Args:
        name: one of `NAMES`.

    Raises:
        ValueError: an unknown name, with the nearest ones.
    """
    if name not in _TABLE:
        raise unknown("reward", name, _TABLE)
    module = importlib.import_module(f"{__package__}.{_TABLE[name][0].split(':')[0]}")
    return [need.place for need in getattr(module, "NEEDS", ()) if need.here is None]


def _one(text: str, options: Mapping[str, Any]) -> Reward:
    """Make one reward of 'name:key=value,key=value', a URL, a file, or a function of rewards."""
    called = call(text)
    if called is not None:
        return _apply(*called, options, text)
    if "(" in text and text.split("(")[0].strip() in _FUNCTIONS:
        raise ValueError(f"cannot read the reward {text!r}: a bracket is not closed")
    if _URL.fullmatch(text):
        return _make(_find("remote"), "remote", {"url": text, **options})
    match = _FILE.fullmatch(text)
    if match is not None:
        found = from_file(Path(match["file"]), match["name"])
        name, written = f"{match['file']}:{match['name']}", match["options"]
    else:
        name, _, written = text.partition(":")
        found = _find(name.strip())
    return _make(found, name, {**written_options(written, name), **options})


def _apply(function: str, inside: str, options: Mapping[str, Any], text: str) -> Reward:
    """Make the reward of 'function(reward, reward, key=value)', or of a sum in brackets."""
    if not function and not options:
        return load(inside)
    if function not in _FUNCTIONS:
        raise unknown("function of rewards", function, _FUNCTIONS)
    made = _ours(_FUNCTIONS[function][0])
    parameters = inspect.signature(made).parameters.values()
    own = [p for p in parameters if p.name not in {"reward", "rewards"}]
    rewards, written = arguments(inside, [p.name for p in own], function, text)
    given = {**written_options(",".join(written), function), **options}
    single = "rewards" not in {p.name for p in parameters}
    if single and len(rewards) != 1:
        raise ValueError(f"{function}(...) takes one reward, and {text!r} has {len(rewards)}")
    if lacking := _lacking(own, given):
        raise ValueError(f"{function}(...) needs {lacking[0]}=...: {text!r} leaves it out")
    return _called(made, function, *(load(part) for part in rewards), **given)


def _lacking(parameters: Iterable[inspect.Parameter], given: Mapping[str, Any]) -> list[str]:
    """Return the options without a default that were not given."""
    return [
        p.name
        for p in parameters
        if p.default is p.empty
        and p.name not in given
        and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]


def _called(made: Any, name: str, /, *args: Any, **options: Any) -> Any:
    """Call a constructor; a value of a wrong type is the user's mistake, not a fault inside."""
    try:
        return made(*args, **options)
    except TypeError as error:
        raise ValueError(f"{name!r} cannot take {options}: {error}") from error


def _ours(place: str) -> Any:
    """Return what stands at a place of the tables, imported only now."""
    module, attribute = place.split(":")
    return getattr(importlib.import_module(f"{__package__}.{module}"), attribute)


def _find(name: str) -> Any:
    """Find a name: ours, another package's entry point, or a dotted path."""
    if name in _TABLE:
        return _ours(_TABLE[name][0])
    others = {point.name: point for point in entry_points(group=GROUP)}
    if name in others:
        return others[name].load()
    module, _, attribute = name.rpartition(".")
    if module and re.fullmatch(r"[\w.]+", name):
        try:
            return getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise ValueError(
                f"cannot load the reward {name!r}: {error}. Give an importable path pkg.mod.Name, "
                f"a file as file.py:Name, or one of {', '.join([*_TABLE, *others])}"
            ) from error
    known = [*_TABLE, *others]
    if name.lower() in _TABLE:
        return _find(name.lower())
    if name in _FUNCTIONS:
        raise ValueError(
            f"{name!r} makes a reward of rewards: write {name}(clip), or {name}(clip, brightness)"
        )
    raise ValueError(
        f"unknown reward {name!r}: {hint(name, known)}Known: {', '.join(sorted(known))}; or give "
        "file.py:Name or pkg.mod.Name"
    )


def from_file(file: Path, name: str) -> Any:
    """Import a Python file and return what it calls `name`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file has no such name; the message has the nearest ones.
    """
    if not file.is_file():
        raise FileNotFoundError(f"no file {file}: give the path of a Python file, as file.py:Name")
    key = f"_steer_file_{file.resolve().as_posix().replace('/', '_').replace('.', '_')}"
    spec = importlib.util.spec_from_file_location(key, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[key] = module
    spec.loader.exec_module(module)
    if not hasattr(module, name):
        public = [n for n in vars(module) if not n.startswith("_")]
        raise ValueError(
            f"{file} defines no {name!r}: {hint(name, public)}It has {', '.join(public)}"
        )
    return getattr(module, name)


def _make(found: Any, name: str, options: dict[str, Any]) -> Reward:
    """Make a reward of a class, a reward or a callable."""
    if isinstance(found, type):
        bare = found.__init__ in (object.__init__, nn.Module.__init__)  # type: ignore[misc]
        takes = {} if bare else inspect.signature(found).parameters
        strange = [key for key in options if key not in takes]
        if strange and not any(p.kind is p.VAR_KEYWORD for p in takes.values()):
            has = ", ".join(takes) or "none"
            raise ValueError(f"reward {name!r} has no option {strange[0]!r}: it has {has}")
        if lacking := _lacking(takes.values(), options):
            raise ValueError(
                f"reward {name!r} needs the option {lacking[0]!r}: write {name}:{lacking[0]}=..."
            )
        found = _called(found, name, **options)
    elif options:
        raise ValueError(f"reward {name!r} is no class, so it takes no options: leave them out")
    return wrap(found)
