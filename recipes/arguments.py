"""From the words of a command, and its YAML, to the arguments of its function (jsonargparse).

The library's subcommands are not used: they want the functions of all commands, and with them
torch, before the first one can be named. Nor are its messages for what is not known, which come
without the nearest names: what is given is compared here with what there is.
"""

import difflib
import importlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_args, get_type_hints

from recipes.commands import COMMANDS
from steer.names import unknown
from steer.secrets import redacted

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

__all__ = [
    "CONFIGS",
    "LATER",
    "Call",
    "function_of",
    "further_help",
    "option_names",
    "parse",
    "parser",
]

CONFIGS = Path(__file__).with_name("configs")
"""The config files of the package, for `--config NAME.yaml`."""

EARLIER = {"finetune": {"clip": "gradient_clip"}}
"""Command -> earlier names of its options -> those of today (`steer.tuning.settings.RENAMED`)."""

LATER = {
    "height": "other sizes than the model's own",
    "width": "other sizes than the model's own",
}
"""Options of `sample` that the models of this version cannot use -> what they are for."""

SWITCHES = {
    "--check", "--cpu", "--json", "--names", "--overwrite", "--private", "--table", "--training",
    "--unguided",
}  # fmt: skip
"""Options that mean true where they stand alone."""


def function_of(command: str) -> Callable[..., Any]:
    """Return the function that a command runs."""
    return _named(COMMANDS[command].target)


def _named(target: str) -> Callable[..., Any]:
    module, name = target.split(":")
    return getattr(importlib.import_module(module), name)


def further_help(command: str) -> str:
    """Return what a command's help says beside its options; nothing for most."""
    target = COMMANDS[command].further
    return f"\n{_named(target)()}\n" if target else ""


def parser(command: str) -> "ArgumentParser":
    """Return the parser of a command: `--config FILE`, and its function's arguments."""
    from jsonargparse import ArgumentParser

    chosen, function = COMMANDS[command], function_of(command)
    made = ArgumentParser(prog=f"steer {command}", exit_on_error=False, allow_abbrev=False)
    made.add_argument("--config", action="config", help="a YAML file whose keys are the options")
    grouped = {name for names in chosen.options.values() for name in names.split()}
    rest = made.add_function_arguments(function, as_positional=chosen.positional, skip=grouped)
    for title, names in chosen.options.items():
        others = {*grouped, *rest} - {*names.split()}
        made.add_argument_group(title).add_function_arguments(
            function, as_group=False, skip=others
        )
    return made


class Call(NamedTuple):
    """What is to be run.

    Attributes:
        command: its name; `eval --lora` where `eval` was given adapters.
        settings: the arguments of its function; None if help was requested.
    """

    command: str
    settings: dict[str, Any] | None


def parse(command: str, rest: Sequence[str]) -> Call:
    """Return the call that a command line describes.

    Raises:
        ValueError: an unknown command, option or key, with the nearest names; a value of a wrong
            kind; a config that is no file or no YAML.
    """
    if command not in COMMANDS:
        raise unknown("command", command, COMMANDS)
    words = _flags(rest)
    given = list(_settings(words))
    command = _variant(command, given)
    if any(word in {"-h", "--help"} for word in words):
        return Call(command, None)
    if COMMANDS[command].several:
        plain = [word for word in words if not word.startswith("-")]
        if plain:
            words = [",".join(plain), *(word for word in words if word.startswith("-"))]
    made = parser(command)
    defaults = made.get_defaults()
    _refuse_unknown(command, given, list(defaults.keys()))
    _refuse_null(command, given, defaults)
    from jsonargparse import ArgumentError

    try:
        options = made.parse_args(words)
        options.pop("config", None)
        return Call(command, made.instantiate(options).as_dict())
    except (ArgumentError, TypeError) as error:
        raise ValueError(" ".join(str(error).split())) from error
    except RecursionError:
        raise ValueError("a value is nested too deeply: write it with fewer brackets") from None


def option_names(command: str) -> list[str]:
    """Return the names of a command's options, `config` among them."""
    names = parser(command).get_defaults().keys()
    return [name for name in names if not (COMMANDS[command].positional and name == "name")]


# ------------------------------------------------------------------ words


def _flags(words: Sequence[str]) -> list[str]:
    """Take `--prompts-file` for `--prompts_file`, and a bare `--overwrite` for true.

    `--lora` given more than once is a list; a `--config` that is no file here is one of ours.
    """
    out: list[str] = []
    repeated = sum(word.partition("=")[0] == "--lora" for word in words) > 1
    for word, after in zip(words, [*words[1:], "--"], strict=False):
        name, equals, value = word.partition("=")
        if out and out[-1] == "--config":
            word = _config(word)
        elif word.startswith("--"):
            value = _config(value) if name == "--config" and equals else value
            word = "--" + name[2:].replace("-", "_") + equals + value
        if repeated and re.match(r"--lora(=|$)", word):
            word = "--lora+" + word[len("--lora") :]
        bare = after.startswith("--") or (word == "--json" and after not in {"true", "false"})
        if bare and word in SWITCHES:
            word += "=true"
        out.append(word)
    return out


def _config(name: str) -> str:
    """Return the file of this name, else the one of the package, with a message."""
    given = Path(name).expanduser()
    if given.is_file():
        return str(given)
    ours = {p.relative_to(CONFIGS).as_posix(): p for p in sorted(CONFIGS.rglob("*.yaml"))}
    asked = given.as_posix().removeprefix("recipes/configs/")
    if asked in ours:
        print(f"config: {ours[asked]}, from the package", file=sys.stderr)
        return str(ours[asked])
    near = difflib.get_close_matches(asked, ours, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise ValueError(f"no config file {name}: {hint}Known config files: {', '.join(ours)}")


class Given(NamedTuple):
    """An option that is given.

    Attributes:
        name: nested ones with dots.
        file: the YAML that gives it, or nothing.
        null: whether it is null there.
    """

    name: str
    file: str = ""
    null: bool = False


def _settings(words: Sequence[str]) -> Iterator[Given]:
    """Yield the options that are given."""
    import yaml

    for word, after in zip(words, [*words[1:], ""], strict=False):
        name, equals, value = word.partition("=")
        if not re.match(r"--\w", word):
            continue
        yield Given(name[2:].rstrip("+"))
        if name != "--config":
            continue
        file = value if equals else after
        try:
            text = Path(file).read_text(encoding="utf-8")
            _refuse_depth(text)
            content = yaml.safe_load(text)
            _refuse_size(content)
        except (yaml.YAMLError, ValueError) as error:
            raise ValueError(
                f"{file} is not a YAML file: {' '.join(str(error).split())}"
            ) from None
        except RecursionError:
            raise ValueError(f"{file} is nested too deeply: write one key per line") from None
        if not isinstance(content, dict):
            raise ValueError(f"{file} has no settings: write one line `key: value` for each")
        if "config" in content:
            raise ValueError(f"{file} names another config: give that one with --config as well")
        _say_code(file, content)
        yield from (Given(key, file, value is None) for key, value in _keys(content))


DEEPEST, MOST = 100, 100_000
"""How deep brackets may go in a config, and how many values it may come to."""


def _refuse_depth(text: str) -> None:
    """Raise a RecursionError for brackets without end: to read them takes time without end."""
    depth = 0
    for bracket in re.findall(r"[\[\]{}]", text):
        depth = max(0, depth + (1 if bracket in "[{" else -1))
        if depth > DEEPEST:
            raise RecursionError


def _refuse_size(content: Any) -> None:
    """Raise a ValueError for what is small as a text, and grows without end when it is read."""
    left, count = [content], 0
    while left:
        one, count = left.pop(), count + 1
        if count > MOST:
            raise ValueError(f"it comes to more than {MOST} values: write them out")
        left += [*one.keys(), *one.values()] if isinstance(one, dict) else ()
        left += one if isinstance(one, list | tuple | set) else ()


_CODE = re.compile(r"\.py:\w|https?://|(?<![\w./=-])[A-Za-z_]\w*(?:\.\w+)+")
"""A Python file's name in it, a URL, a dotted path."""


def _say_code(file: str, content: Mapping[Any, Any]) -> None:
    """Say what a config lets run or asks a server for: that is not seen in the command."""
    for key in ("model", "method", "methods", "reward", "held_out", "judge"):
        named = content.get(key)
        for text in named if isinstance(named, list) else [named]:
            if isinstance(text, str) and _CODE.search(text):
                shown = repr(redacted(text))
                shown = shown if len(shown) <= 200 else f"{shown[:200]} ..."
                print(f"config: {file} loads {key}: {shown}", file=sys.stderr)


def _keys(content: Mapping[Any, Any], head: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the keys of a mapping and their values, the keys inside of it with dots."""
    for key, value in content.items():
        yield f"{head}{key}", value
        if isinstance(value, dict):
            yield from _keys(value, f"{head}{key}.")


def _variant(command: str, given: Sequence[Given]) -> str:
    """Return `eval --lora` for an `eval` that names adapters, by an option or in its YAML."""
    longer = f"{command} --lora"
    named = any(one.name.split(".")[0] == "lora" for one in given)
    return longer if named and longer in COMMANDS else command


def _refuse_null(command: str, given: Sequence[Given], defaults: Mapping[str, Any]) -> None:
    """Raise a ValueError for a null in a YAML where a value is wanted: the library takes it."""
    hints = get_type_hints(function_of(command))
    for name, file, null in given:
        wanted = defaults.get(name) is not None and type(None) not in get_args(hints.get(name))
        if null and wanted:
            raise ValueError(
                f"{file}: {name} is null: give a value, or leave the line out for the default "
                f"({defaults[name]})"
            )


def _refuse_unknown(command: str, given: Sequence[Given], known: Sequence[str]) -> None:
    """Raise a ValueError for the options that there are not, with the nearest names.

    What is inside of a known one is its own matter.
    """
    hints = []
    for name, file, _ in given:
        parts = name.split(".")
        heads = {".".join(parts[: i + 1]) for i in range(len(parts))}
        inner = any(other.startswith(f"{name}.") for other in known)
        if heads & {*known, "help", "print_config"} or inner:
            continue
        dashed = name.replace("_", "-")
        if command == "sample" and dashed in LATER:
            hint = (
                f"option {dashed!r} is for {LATER[dashed]}, which this version's models cannot "
                "use: leave it out"
            )
        else:
            hint = str(unknown("option", name, known, EARLIER.get(command)))
        hints.append(f"{file}: {hint}" if file else hint)
    if hints:
        raise ValueError("; ".join(dict.fromkeys(hints)))
