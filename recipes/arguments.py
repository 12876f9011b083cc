"""Parse a command line and its YAML into the arguments of the command's function (jsonargparse).

jsonargparse's subcommands are not used, because they import the functions of all commands, and
with them torch, before any command is chosen. Its messages for unknown options are not used
either, because they do not suggest the nearest names: options are checked here.
"""

import difflib
import importlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_args, get_type_hints

from recipes.commands import COMMANDS
from recipes.wanted import reworded
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
"""Command -> earlier names of its options -> current names (`steer.tuning.settings.RENAMED`)."""

LATER = {
    "height": "other sizes than the model's own",
    "width": "other sizes than the model's own",
}
"""Options of `sample` that the models of this version cannot use -> their purpose."""

SWITCHES = {
    "--check", "--cpu", "--json", "--names", "--overwrite", "--private", "--table", "--training",
    "--unguided",
}  # fmt: skip
"""Options that mean true without a value."""


def function_of(command: str) -> Callable[..., Any]:
    """Return the function that a command runs."""
    return _named(COMMANDS[command].target)


def _named(target: str) -> Callable[..., Any]:
    module, name = target.split(":")
    return getattr(importlib.import_module(module), name)


def further_help(command: str) -> str:
    """Return further help of a command besides its options; "" for most commands."""
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
    """A parsed command line.

    Attributes:
        command: name of the command; `eval --lora` if `eval` was given adapters.
        settings: the arguments of its function; None if help was requested.
    """

    command: str
    settings: dict[str, Any] | None


def parse(command: str, rest: Sequence[str]) -> Call:
    """Return the call that a command line describes.

    Raises:
        ValueError: an unknown command, option or key (the message has the nearest names), a value
            of the wrong type, or a config that is not a file or not YAML.
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
        message = " ".join(str(error).split())
        raise ValueError(reworded(message, option_types(made))) from error
    except RecursionError:
        raise ValueError("a value is nested too deeply: write it with fewer brackets") from None


def option_names(command: str) -> list[str]:
    """Return the names of a command's options, `config` among them."""
    names = parser(command).get_defaults().keys()
    return [name for name in names if not (COMMANDS[command].positional and name == "name")]


def option_types(made: "ArgumentParser") -> dict[str, Any]:
    """Return the types of a parser's options by name, those behind `**settings` among them."""
    types = {a.dest: getattr(a, "_typehint", a.type) for a in made._actions}
    return {name: hint for name, hint in types.items() if hint is not None}


# ------------------------------------------------------------------ words


def _flags(words: Sequence[str]) -> list[str]:
    """Accept `--prompts-file` for `--prompts_file`, and a bare `--overwrite` as true.

    Several `--lora` become a list; a `--config` that is not an existing file is looked up in the
    package.
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
    """Return the file of this name, else that of the package, with a message."""
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
    """An option that was given.

    Attributes:
        name: name of the option, with dots for nested ones.
        file: the YAML file that sets it, or "".
        null: whether its value there is null.
    """

    name: str
    file: str = ""
    null: bool = False


def _settings(words: Sequence[str]) -> Iterator[Given]:
    """Yield the options that were given."""
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
"""Maximum depth of brackets in a config, and maximum number of values."""


def _refuse_depth(text: str) -> None:
    """Raise a RecursionError for brackets that are nested too deeply to be parsed quickly."""
    depth = 0
    for bracket in re.findall(r"[\[\]{}]", text):
        depth = max(0, depth + (1 if bracket in "[{" else -1))
        if depth > DEEPEST:
            raise RecursionError


def _refuse_size(content: Any) -> None:
    """Raise a ValueError for a small text that expands to too many values when it is parsed."""
    left, count = [content], 0
    while left:
        one, count = left.pop(), count + 1
        if count > MOST:
            raise ValueError(f"it comes to more than {MOST} values: write them out")
        left += [*one.keys(), *one.values()] if isinstance(one, dict) else ()
        left += one if isinstance(one, list | tuple | set) else ()


_CODE = re.compile(r"\.py:\w|https?://|(?<![\w./=-])[A-Za-z_]\w*(?:\.\w+)+")
"""Matches a name in a Python file, a URL, or a dotted path."""


def _say_code(file: str, content: Mapping[Any, Any]) -> None:
    """Print what code a config runs and what servers it contacts; the command does not show it."""
    for key in ("model", "method", "methods", "reward", "held_out", "judge"):
        named = content.get(key)
        for text in named if isinstance(named, list) else [named]:
            if isinstance(text, str) and _CODE.search(text):
                shown = repr(redacted(text))
                shown = shown if len(shown) <= 200 else f"{shown[:200]} ..."
                print(f"config: {file} loads {key}: {shown}", file=sys.stderr)


def _keys(content: Mapping[Any, Any], head: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the keys and values of a mapping, with dotted keys for nested mappings."""
    for key, value in content.items():
        yield f"{head}{key}", value
        if isinstance(value, dict):
            yield from _keys(value, f"{head}{key}.")


def _variant(command: str, given: Sequence[Given]) -> str:
    """Return `eval --lora` for an `eval` with adapters, given by an option or in its YAML."""
    longer = f"{command} --lora"
    named = any(one.name.split(".")[0] == "lora" for one in given)
    return longer if named and longer in COMMANDS else command


def _refuse_null(command: str, given: Sequence[Given], defaults: Mapping[str, Any]) -> None:
    """Raise a ValueError for a null in a YAML where a value is needed; jsonargparse accepts it."""
    hints = get_type_hints(function_of(command))
    for name, file, null in given:
        wanted = defaults.get(name) is not None and type(None) not in get_args(hints.get(name))
        if null and wanted:
            raise ValueError(
                f"{file}: {name} is null: give a value, or leave the line out for the default "
                f"({defaults[name]})"
            )


def _refuse_unknown(command: str, given: Sequence[Given], known: Sequence[str]) -> None:
    """Raise a ValueError for unknown options, with the nearest names.

    The contents of a known option are not checked here.
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
