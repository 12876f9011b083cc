"""Values of the wrong type: what the option takes, in words, for every option of every command."""

from typing import Any, get_args

import pytest

from recipes.arguments import option_types, parse, parser
from recipes.commands import COMMANDS


def takes_text(hint):
    return hint is Any or hint is str or any(takes_text(part) for part in get_args(hint))


def typed():
    """Each command with its options that do not take any text."""
    for command in COMMANDS:
        for name, hint in option_types(parser(command)).items():
            if name in ("json", "help", "config"):  # the word after --json is none of its own
                continue
            if not takes_text(hint) and "Path" not in str(hint):
                yield pytest.param(command, name, id=f"{command}-{name}")


def test_options_behind_settings_are_seen_too():
    names = {p.values[1] for p in typed() if p.values[0] == "finetune"}
    assert {"learning_rate", "sweep", "rank", "steps"} <= names


@pytest.mark.parametrize(("command", "name"), [*typed()])
def test_a_value_of_the_wrong_type_is_told_in_words(command, name):
    words = ["--lora", "x"] if "--lora" in command else []
    with pytest.raises(ValueError, match="takes ") as told:
        parse(command.split()[0], [*words, f"--{name}", "no-such-value"])
    option = f"--{name.replace('_', '-')}"
    line = str(told.value)
    assert line.startswith(f"{option} takes ")
    assert line.endswith(", got no-such-value")
    assert "class" not in line.removeprefix(option)
    assert "typing" not in line


@pytest.mark.parametrize(
    ("option", "told"),
    [
        (["--steps", "2.5"], "--steps takes a whole number, got 2.5"),
        (["--scale", "nan"], "--scale takes a number, got nan"),
        (["--dtype", "f8"], "--dtype takes float32, bfloat16, float16 or float64, got f8"),
        (["--settle", "2"], "--settle takes true or false, got 2"),
        (["--rate", "x"], "--rate takes a number, got x"),
        (["--steps.x", "7"], "--steps takes a whole number"),
    ],
)  # fmt: skip
def test_the_words(option, told):
    with pytest.raises(ValueError) as found:  # noqa: PT011
        parse("sample", option)
    assert str(found.value) == told


def test_a_wrong_element_is_told_with_its_list():
    with pytest.raises(ValueError, match=r"list of numbers .*, got \[0.2, 'a'\]$"):
        parse("sample", ["--window", "[0.2, a]"])
