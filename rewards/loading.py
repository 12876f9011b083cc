"""Rewards from text: names, functions of rewards, files, dotted paths, servers."""

import importlib
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from torch import nn

from rewards.catalogue import FUNCTION_PLACES, FUNCTIONS, GROUP, NAMES, PLACES
from rewards.grammar import arguments, call, terms, written_options
from rewards.trust import (
    nothing_fetched,
    refuse_options,
    refuse_shape,
    refuse_size,
    refuse_unknown,
)
from steer.reward import Reward, hint, unknown, wrap
from steer.secrets import redacted
from steer.user_code import from_file

__all__ = [
    "FUNCTIONS",
    "NAMES",
    "Reward",
    "from_file",
    "load",
    "load_plain",
    "missing",
    "read",
    "wrap",
]

_URL = re.compile(r"https?://\S+")
_FILE = re.compile(r"(?P<file>.+\.py):(?P<name>\w+)(?::(?P<options>.*))?")


def load(spec: str, **options: Any) -> Reward:
    """Make a reward from a text.

    Args:
        spec: a name of `NAMES` ("clip"), with options after a colon ("colour:name=red"), a
            function or class in a file ("file.py:Name") or a module ("pkg.mod.Name"), an entry
            point of another package (group `flowsteer.rewards`), a server's URL
            ("http://127.0.0.1:8000"), a weighted sum of such ("0.7*clip + 0.3*colour:name=red -
            0.1*jpeg"), or one of `FUNCTIONS` of such ("capped(min(clip, brightness), at=0.3)").
        options: more options, for a single reward.

    Raises:
        ValueError: an unknown name or option; the message has similar ones.
        FileNotFoundError: no such file.
        TypeError: the object is not callable.
    """
    try:
        return _sum(spec, options)()
    except (TypeError, ValueError) as error:
        if redacted(str(error)) == str(error):
            raise
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(redacted(str(error))) from None  # the message includes the cause


def load_plain(spec: str) -> Reward:
    """Make a reward from a text in a data file: only rewards of the package are allowed.

    Nothing is imported, run, opened or downloaded because the text names it. A reward with
    published weights is made only if they are already on this machine.

    Args:
        spec: names of `NAMES` but `remote`, in sums and functions, with options that are numbers
            and words.

    Raises:
        ValueError: it names something else, or something that would be downloaded; the message
            says what.
    """
    refuse_size(spec)
    with nothing_fetched():
        return _sum(spec, {}, _of_the_package)()


def read(spec: str, check: "Check") -> "Maker":
    """Parse a text; `check` may refuse rewards and options before anything is imported.

    Args:
        spec: sums and functions of rewards; files and servers are not understood.
        check: called for each reward and each function.

    Returns:
        A function that makes the reward.

    Raises:
        ValueError: it cannot be read; what the check raises.
    """
    refuse_size(spec)
    return _sum(spec, {}, check)


def _of_the_package(name: str | None, options: Mapping[str, Any]) -> None:
    """Refuse names that a text from an untrusted file may not contain."""
    if name is not None:
        refuse_unknown(name)
    refuse_options(options)


Check = Callable[[str | None, Mapping[str, Any]], None]
"""(the reward's name, or None for a function; options) -> raises an error for forbidden names."""

Maker = Callable[[], Reward]
"""Makes a reward from a parsed text: the whole text is parsed before any weights are loaded."""


def _sum(spec: str, options: Mapping[str, Any], check: "Check | None" = None) -> Maker:
    """Read a weighted sum."""
    parts = list(terms(spec))
    if options and len(parts) > 1:
        raise ValueError(
            f"options {sorted(options)} for the sum {spec!r}: write them into its terms, as in "
            "'0.5*colour:name=red + clip'"
        )
    makers = [(weight, _one(text, options, check)) for weight, text in parts]

    def make() -> Reward:
        made = [(weight, maker()) for weight, maker in makers]
        total = made[0][1] if made[0][0] == 1 else made[0][0] * made[0][1]
        for weight, reward in made[1:]:
            total = total + weight * reward
        return total

    return make


def missing(name: str) -> list[str]:
    """Return what a reward with default options needs and this machine lacks, one line each.

    >>> missing("brightness")
    []

    Args:
        name: one of `NAMES`.

    Raises:
        ValueError: an unknown name, with the nearest ones.
    """
    if name not in PLACES:
        raise unknown("reward", name, PLACES)
    module = importlib.import_module(f"{__package__}.{PLACES[name][0].split(':')[0]}")
    return [need.place for need in getattr(module, "NEEDS", ()) if need.here is None]


def _one(text: str, options: Mapping[str, Any], check: "Check | None") -> Maker:
    """Read one reward: 'name:key=value,key=value', a URL, a file, a function of rewards."""
    called = call(text)
    if called is not None:
        return _apply(*called, options, text, check)
    if "(" in text and text.split("(")[0].strip() in FUNCTION_PLACES:
        raise ValueError(f"cannot read the reward {text!r}: a bracket is not closed")
    if check is None and _URL.fullmatch(text):
        return partial(_make, _find("remote"), "remote", {"url": text, **options})
    match = None if check else _FILE.fullmatch(text)
    if match is not None:
        found = from_file(Path(match["file"]), match["name"])
        name, written = f"{match['file']}:{match['name']}", match["options"]
    else:
        name, _, written = text.partition(":")
        if check is not None:
            check(name.strip(), {})  # check the name first: the text after it may not be options
            check(name.strip(), written_options(written, name))
        found = _find(name.strip())
    return partial(_make, found, name, {**written_options(written, name), **options})


def _apply(
    function: str, inside: str, options: Mapping[str, Any], text: str, check: "Check | None"
) -> Maker:
    """Read 'function(reward, reward, key=value)', or a sum in brackets."""
    if not function and not options:
        return _sum(inside, {}, check)
    if function not in FUNCTION_PLACES:
        raise unknown("function of rewards", function, FUNCTION_PLACES)
    made = _ours(FUNCTION_PLACES[function][0])
    parameters = inspect.signature(made).parameters.values()
    own = [p for p in parameters if p.name not in {"reward", "rewards"}]
    rewards, written = arguments(inside, [p.name for p in own], function, text)
    given = {**written_options(",".join(written), function), **options}
    if check is not None:
        check(None, given)
    single = "rewards" not in {p.name for p in parameters}
    if single and len(rewards) != 1:
        raise ValueError(f"{function}(...) takes one reward, and {text!r} has {len(rewards)}")
    if lacking := _lacking(own, given):
        raise ValueError(f"{function}(...) needs {lacking[0]}=...: {text!r} leaves it out")
    inner = [_sum(part, {}, check) for part in rewards]
    return lambda: _called(made, function, *(maker() for maker in inner), **given)


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
    """Call a constructor; report a value of a wrong type as the user's mistake."""
    try:
        return made(*args, **options)
    except TypeError as error:
        raise ValueError(f"{name!r} cannot take {options}: {error}") from error


def _ours(place: str) -> Any:
    """Import and return the object at a place that the tables name."""
    module, attribute = place.split(":")
    return getattr(importlib.import_module(f"{__package__}.{module}"), attribute)


def _find(name: str) -> Any:
    """Find a name: ours, another package's entry point, or a dotted path."""
    if name in PLACES:
        return _ours(PLACES[name][0])
    others = {point.name: point for point in entry_points(group=GROUP)}
    if name in others:
        return others[name].load()
    module, _, attribute = name.rpartition(".")
    if module and re.fullmatch(r"[\w.]+", name):
        try:
            found = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise ValueError(
                f"cannot load the reward {name!r}: {error}. Give an importable path pkg.mod.Name, "
                f"a file as file.py:Name, or one of {', '.join([*PLACES, *others])}"
            ) from error
        refuse_shape(found, name)
        return found
    known = [*PLACES, *others]
    if name.lower() in PLACES:
        return _find(name.lower())
    if name in FUNCTION_PLACES:
        raise ValueError(
            f"{name!r} combines rewards: write {name}(clip), or {name}(clip, brightness)"
        )
    raise ValueError(
        f"unknown reward {name!r}: {hint(name, known)}Known: {', '.join(sorted(known))}; or give "
        "file.py:Name or pkg.mod.Name"
    )


def _make(found: Any, name: str, options: dict[str, Any]) -> Reward:
    """Make a reward from a class, a reward or a callable."""
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
        raise ValueError(f"reward {name!r} is not a class, so it takes no options: leave them out")
    return wrap(found)
