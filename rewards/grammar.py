"""The syntax of reward texts: weighted sums, functions of rewards, options after a colon."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import yaml

from steer.secrets import SECRET

__all__ = ["arguments", "call", "terms", "written_options"]

_NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_MINUS = rf"(?:\s-\s|-\s*(?={_NUMBER}\s*\*))"
_TERM = re.compile(
    rf"\s*(?P<sign>[+-]?)\s*(?:(?P<weight>{_NUMBER})\s*\*)?"
    rf"\s*(?P<name>[^\s+*-].*?)\s*(?=\+|{_MINUS}|$)",
    re.DOTALL,
)
_CALL = re.compile(r"(?P<function>\w*)\s*\((?P<inside>.*)\)", re.DOTALL)


def terms(spec: str) -> Iterable[tuple[float, str]]:
    """Split a sum at each '+', and at each '-' with spaces around it or a weight behind it.

    >>> list(terms("0.7*clip - min(jpeg, colour:name=red)"))
    [(0.7, 'clip'), (-1.0, 'min(jpeg, colour:name=red)')]

    Raises:
        ValueError: it cannot be read.
    """
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


def call(text: str) -> tuple[str, str] | None:
    """Return a function's name and the text inside its brackets; None if the text is not a call.

    >>> call("min(clip, jpeg)"), call("(clip)"), call("clip")
    (('min', 'clip, jpeg'), ('', 'clip'), None)
    """
    match = _CALL.fullmatch(text)
    if match is None or _masked(text).count("(") != 1:
        return None
    return match["function"], match["inside"]


def arguments(
    inside: str, own: Sequence[str], function: str, text: str
) -> tuple[list[str], list[str]]:
    """Split the text inside a function's brackets into rewards and the function's own options.

    >>> arguments("colour:name=red, jpeg, smooth=0.1", ["smooth"], "min", "min(...)")
    (['colour:name=red', ' jpeg'], ['smooth=0.1'])

    Args:
        inside: the text inside the brackets.
        own: the names of the function's options.
        function: its name, for the message.
        text: the whole call, for the message.

    Raises:
        ValueError: a number, or an option that is neither the function's nor a reward's.
    """
    rewards: list[str] = []
    written: list[str] = []
    for part in _pieces(inside):
        key = part.partition("=")[0].strip()
        if "=" in part and key in own:
            written.append(part.strip())
        elif re.fullmatch(r"\s*\w+=.*", part, re.DOTALL) and rewards and ":" in rewards[-1]:
            rewards[-1] += "," + part  # an option of the preceding reward
        elif re.fullmatch(rf"\s*-?{_NUMBER}\s*", part) or re.fullmatch(r"\s*\w+=.*", part):
            raise ValueError(
                f"cannot read {part.strip()!r} in {text!r}: {function} has the options "
                f"{', '.join(own)}, written {own[0]}=..."
            )
        else:
            rewards.append(part)
    return rewards, written


def written_options(written: str | None, name: str) -> dict[str, Any]:
    """Read 'key=value,key=value'; the values are YAML scalars.

    >>> written_options("name=red,width=3", "colour")
    {'name': 'red', 'width': 3}

    Args:
        written: the text; None: there is none.
        name: whose options they are, for the message.

    Raises:
        ValueError: no key, or no plain value.
    """
    out = {}
    for pair in filter(None, _pieces(written or "")):
        key, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"option {pair!r} of reward {name!r}: write key=value")
        try:
            out[key.strip()] = value if value.startswith("#") else yaml.safe_load(value)
        except yaml.YAMLError:
            raise ValueError(
                f"option {pair!r} of reward {name!r}: {value!r} is not a plain value, such as 3, "
                "red or 'in quotes'"
            ) from None
    return out


def _masked(text: str) -> str:
    """Replace text inside brackets, and tokens, by x, so that it is not parsed."""
    text = SECRET.sub(lambda found: found["key"] + "x" * len(found["value"]), text)
    out, depth = [], 0
    for letter in text:
        depth -= letter in ")]"
        out.append("x" if depth > 0 else letter)
        depth += letter in "(["
        if depth < 0:
            return text  # not balanced, so not brackets of this syntax
    return text if depth else "".join(out)


def _pieces(text: str) -> Iterable[str]:
    """Split a text at its commas, except those inside brackets."""
    place = 0
    for piece in _masked(text).split(","):
        yield text[place : place + len(piece)]
        place += len(piece) + 1
