"""Limits on the configuration of a network, since a model's file may be untrusted."""

import math
from collections.abc import Mapping
from typing import Any

__all__ = ["HEADS", "check_network"]

HEADS = 4
"""Heads of the attention: the channels of the last level must be a multiple of this."""

MOST = {"channels": 4096, "blocks": 64, "size": 1024, "width": 8192, "groups": 4096}
"""The largest numbers that are accepted."""

LEVELS, WORDS, FREQUENCY = 8, 1_000_000, 1e6
"""Maximum numbers of levels and words, and the highest frequency of a time embedding."""


def check_network(config: Mapping[str, Any]) -> None:
    """Check the configuration of a `TwoTimeUNet` before it is used.

    Args:
        config: its arguments by their names, all of them.

    Raises:
        ValueError: a value that is not a number or out of bounds, or numbers that do not fit
            together; the message names it and says what it must be.
    """
    words = config["vocabulary"]
    if len(words) > WORDS or not all(isinstance(word, str) for word in words):
        raise ValueError(f"vocabulary must be a list of words, {WORDS} at most")
    channels, blocks, groups = config["channels"], config["blocks"], config["groups"]
    if not 1 <= len(channels) <= LEVELS:
        raise ValueError(f"channels must be of 1 to {LEVELS} levels, got {len(channels)}")
    if len(blocks) != len(channels):
        raise ValueError(
            f"blocks must be as many as channels: {len(blocks)} for {len(channels)} levels"
        )
    for name in ("size", "width", "groups"):
        _whole(name, config[name], 1)
    if config.get("colours", 3) not in {1, 3}:
        raise ValueError(f"colours must be 1 or 3, got {_short(config['colours'])}")
    for count in blocks:
        _whole("blocks", count, 0)
    for count in channels:
        _whole("channels", count, 1)
        if count % groups:
            raise ValueError(f"channels must be multiples of groups={groups}, got {count}")
    if channels[-1] % HEADS:
        raise ValueError(f"the last channels must be a multiple of {HEADS}, got {channels[-1]}")
    halved = 2 ** (len(channels) - 1)
    if config["size"] % halved:
        raise ValueError(
            f"size must be a multiple of {halved} for {len(channels)} levels, which halve it, got "
            f"{config['size']}"
        )
    guidance = config.get("guidance")
    if guidance is not None and not (
        len(guidance) == 2 and all(map(_frequency, guidance)) and guidance[0] < guidance[1]
    ):
        raise ValueError(
            f"guidance must be two scales above 0, the smaller first, got {_short(guidance)}"
        )
    highest = config["highest"]
    if len(highest) != 2 or not all(map(_frequency, highest)):
        raise ValueError(
            f"highest must be two frequencies above 0, {FREQUENCY:g} at most, got "
            f"{_short(highest)}"
        )


def _whole(name: str, value: Any, least: int) -> None:
    """Refuse a value that is not a whole number within bounds."""
    if type(value) is not int or not least <= value <= MOST[name]:
        raise ValueError(
            f"{name} must be whole numbers from {least} to {MOST[name]}, got {_short(value)}"
        )


def _frequency(value: Any) -> bool:
    known = isinstance(value, int | float) and not isinstance(value, bool)
    return known and math.isfinite(value) and 0 < value <= FREQUENCY


def _short(value: Any) -> str:
    """Return an untrusted value as a short text."""
    return repr(value)[:40]
