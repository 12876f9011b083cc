"""From a text to a reward: names, options, sums and functions, files, dotted paths, servers."""

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

import yaml
from torch import nn

from rewards.messages import hint, unknown
from steer.reward import Reward, wrap

__all__ = ["FUNCTIONS", "NAMES", "from_file", "load", "missing"]

_TABLE = {
    "clip": (
        "rewards.clip:Clip",
        "cosine similarity of picture and prompt, by an open_clip model",
    ),
    "colour": ("rewards.colour:Colour", "how near the drawing is to a named colour (name=red)"),
    "brightness": ("rewards.colour:Brightness", "mean luma, from 0 (black) to 1 (white)"),
    "contrast": ("rewards.tone:Contrast", "standard deviation of luma, from 0 to 0.5"),
    "saturation": ("rewards.tone:Saturation", "mean chroma of the drawing, from 0 to 1"),
    "sharpness": ("rewards.tone:Sharpness", "RMS Laplacian of luma, from 0 to 1"),
    "smoothness": ("rewards.tone:Smoothness", "minus the total variation, from -1 to 0"),
    "symmetry": (
        "rewards.form:Symmetry",
        "how alike the halves are, from -1 to 0 (axis=vertical or horizontal)",
    ),
    "antisymmetry": (
        "rewards.form:Antisymmetry",
        "how far the halves are negatives, from 0 to 1 (axis=vertical or horizontal)",
    ),
    "layout": (
        "rewards.form:Layout",
        "share of the ink inside region=left, right, top, bottom, centre, or inside mask=FILE",
    ),
    "similarity": (
        "rewards.reference:Similarity",
        "closeness to the picture image=FILE, from -1 to 0 (by=colour or luma)",
    ),
    "jpeg": ("rewards.jpeg:Jpeg", "minus the size as a JPEG file in kB; no gradient"),
    "siglip": ("rewards.siglip:Siglip", "cosine of picture and prompt by SigLIP 1 or 2"),
    "pickscore": (
        "rewards.pickscore:PickScore",
        "which picture people pick for a prompt, about 16 to 26",
    ),
    "hpsv2": (
        "rewards.hpsv2:HPSv2",
        "which picture people prefer for a prompt, about .2 to .35 (version=2.1 or 2.0)",
    ),
    "imagereward": (
        "rewards.imagereward:ImageReward",
        "how well people find a picture and its fit to the prompt, about -2.5 to 2.5",
    ),
    "mps": (
        "rewards.mps:MPS",
        "how people prefer a picture for a prompt under a condition",
    ),
    "aesthetic": (
        "rewards.aesthetic:Aesthetic",
        "LAION's mark for beauty, about 1 to 10; asks for no prompt",
    ),
    "vqa": (
        "rewards.vqa:VQA",
        "log-probability of an answer about the picture, by a vision-language model",
    ),
    "classifier": (
        "rewards.classifier:Classifier",
        "log-probability of a class (model=timm:NAME or torchvision:NAME, target=)",
    ),
    "lpips": ("rewards.lpips:Lpips", "minus the perceptual distance to image=FILE"),
    "dino": ("rewards.dino:Dino", "cosine of self-supervised features with those of image=FILE"),
    "remote": ("rewards.remote:Remote", "what a server of rewards says (url=http://HOST:PORT)"),
}
NAMES: Mapping[str, str] = MappingProxyType({name: line for name, (_, line) in _TABLE.items()})
"""Name -> one line."""

GROUP = "flowsteer.rewards"
"""The entry-point group in which other packages offer rewards."""

_FUNCTIONS = {
    "min": ("rewards.algebra:Minimum", "the least of some rewards (smooth=WIDTH)"),
    "product": ("rewards.algebra:Product", "log of the chance that all accept (at=, width=)"),
    "capped": ("rewards.algebra:Capped", "a reward that is content with a target (at=, soft=)"),
    "ensemble": ("rewards.algebra:Ensemble", "the mean less the disagreement (penalty=)"),
    "normalised": ("rewards.algebra:Normalised", "scaled by what the run has seen (decay=)"),
    "augmented": (
        "rewards.augment:Augmented",
        "the mean over random crops, flips and noise (views=, crop=, flip=, noise=, seed=)",
    ),
    "batched": ("rewards.algebra:Batched", "in micro-batches, for memory (size=)"),
}
FUNCTIONS: Mapping[str, str] = MappingProxyType({k: line for k, (_, line) in _FUNCTIONS.items()})
"""What makes a reward of rewards, as in `min(clip, 2*brightness)`: name -> one line."""

_NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_MINUS = rf"(?:\s-\s|-\s*(?={_NUMBER}\s*\*))"
_TERM = re.compile(
    rf"\s*(?P<sign>[+-]?)\s*(?:(?P<weight>{_NUMBER})\s*\*)?"
    rf"\s*(?P<name>[^\s+*-].*?)\s*(?=\+|{_MINUS}|$)",
    re.DOTALL,
)
_CALL = re.compile(r"(?P<function>\w*)\s*\((?P<inside>.*)\)", re.DOTALL)
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
    terms = list(_terms(spec))
    if options and len(terms) > 1:
        raise ValueError(
            f"options {sorted(options)} for the sum {spec!r}: write them into its terms, as in "
            "'0.5*colour:name=red + clip'"
        )
    made = [(weight, _one(text, options)) for weight, text in terms]
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
    module = importlib.import_module(_TABLE[name][0].split(":")[0])
    return [need.place for need in getattr(module, "NEEDS", ()) if need.here is None]


def _terms(spec: str) -> Iterable[tuple[float, str]]:
    """Split a sum at each '+', and at each '-' with spaces around it or a weight behind it."""
    place, seen = 0, _masked(spec)
    while place < max(1, len(spec.rstrip())):
        match = _TERM.match(seen, place)
        if match is None:
            raise ValueError(
                f"cannot read the reward {spec!r}: write a name, or a sum such as "
                "'0.7*clip + 0.3*colour:name=red'"
            )
        a, b = match.span("name")
        yield (-1 if match["sign"] == "-" else 1) * float(match["weight"] or 1), spec[a:b]
        place = match.end()


def _masked(text: str) -> str:
    """Put x for all that is inside brackets, so that it is not taken for something outside."""
    out, depth = [], 0
    for letter in text:
        depth -= letter in ")]"
        out.append("x" if depth > 0 else letter)
        depth += letter in "(["
        if depth < 0:
            return text  # not balanced: no brackets of ours
    return text if depth else "".join(out)


def _pieces(text: str) -> Iterable[str]:
    """Split a text at its commas, but for those inside brackets."""
    place = 0
    for piece in _masked(text).split(","):
        yield text[place : place + len(piece)]
        place += len(piece) + 1


def _one(text: str, options: Mapping[str, Any]) -> Reward:
    """Make one reward of 'name:key=value,key=value', a URL, a file, or a function of rewards."""
    call = _CALL.fullmatch(text)
    if call is not None and _masked(text).count("(") == 1:
        return _apply(call["function"], call["inside"], options, text)
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
    return _make(found, name, {**_options(written, name), **options})


def _apply(function: str, inside: str, options: Mapping[str, Any], text: str) -> Reward:
    """Make the reward of 'function(reward, reward, key=value)', or of a sum in brackets."""
    if not function and not options:
        return load(inside)
    if function not in _FUNCTIONS:
        raise unknown("function of rewards", function, _FUNCTIONS)
    module, attribute = _FUNCTIONS[function][0].split(":")
    made = getattr(importlib.import_module(module), attribute)
    parameters = inspect.signature(made).parameters.values()
    own = [p.name for p in parameters if p.name not in {"reward", "rewards"}]
    rewards: list[str] = []
    written: list[str] = []
    for part in _pieces(inside):
        key = part.partition("=")[0].strip()
        if "=" in part and key in own:
            written.append(part.strip())
        elif re.fullmatch(r"\s*\w+=.*", part, re.DOTALL) and rewards and ":" in rewards[-1]:
            rewards[-1] += "," + part  # an option of the reward before it
        elif re.fullmatch(rf"\s*-?{_NUMBER}\s*", part) or re.fullmatch(r"\s*\w+=.*", part):
            raise ValueError(
                f"cannot read {part.strip()!r} in {text!r}: {function} has the options "
                f"{', '.join(own)}, written {own[0]}=..."
            )
        else:
            rewards.append(part)
    given = {**_options(",".join(written), function), **options}
    single = "rewards" not in {p.name for p in parameters}
    if single and len(rewards) != 1:
        raise ValueError(f"{function}(...) takes one reward, and {text!r} has {len(rewards)}")
    missing = [
        p.name
        for p in parameters
        if p.name in own and p.default is p.empty and p.name not in given
    ]
    if missing:
        raise ValueError(f"{function}(...) needs {missing[0]}=...: {text!r} leaves it out")
    return _called(made, function, *(load(part) for part in rewards), **given)


def _called(made: Any, name: str, /, *args: Any, **options: Any) -> Any:
    """Call a constructor; a value of a wrong type is the user's mistake, not a fault inside."""
    try:
        return made(*args, **options)
    except TypeError as error:
        raise ValueError(f"{name!r} cannot take {options}: {error}") from error


def _options(written: str | None, name: str) -> dict[str, Any]:
    """Read 'key=value,key=value'; the values are YAML scalars."""
    out = {}
    for pair in filter(None, _pieces(written or "")):
        key, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"option {pair!r} of reward {name!r}: write key=value")
        try:
            out[key.strip()] = value if value.startswith("#") else yaml.safe_load(value)
        except yaml.YAMLError:
            raise ValueError(
                f"option {pair!r} of reward {name!r}: {value!r} is no plain value, as 3, red or "
                "'in quotes' are"
            ) from None
    return out


def _find(name: str) -> Any:
    """Find a name: ours, another package's entry point, or a dotted path."""
    if name in _TABLE:
        module, attribute = _TABLE[name][0].split(":")
        return getattr(importlib.import_module(module), attribute)
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
        missing = [
            key
            for key, p in takes.items()
            if p.default is p.empty
            and key not in options
            and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        ]
        if missing:
            raise ValueError(
                f"reward {name!r} needs the option {missing[0]!r}: write {name}:{missing[0]}=..."
            )
        found = _called(found, name, **options)
    elif options:
        raise ValueError(f"reward {name!r} is no class, so it takes no options: leave them out")
    return wrap(found)
