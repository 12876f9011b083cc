"""The command line: `steer COMMAND`.

Each command is a typed function, and its YAML keys are the function's arguments (jsonargparse).
The library's subcommands are not used: they want the functions of all commands, and with them
torch, before the first one can be named.
"""

import difflib
import importlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.commands import COMMANDS, GROUPS
from recipes.faults import explained, place
from recipes.terminal import UnheardError, say
from steer.names import reason, unknown

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

__all__ = ["CONFIGS", "LATER", "main", "option_names", "parser"]

CONFIGS = Path(__file__).with_name("configs")
"""The settings that come along, for `--config NAME.yaml`."""

LATER = {
    "height": "other sizes than the model's own",
    "width": "other sizes than the model's own",
}
"""Options of `sample` that the models of this version cannot use -> what they are for."""

SWITCHES = {"--check", "--json", "--overwrite", "--private"}
"""Options that mean true where they stand alone."""


def _function(command: str) -> Callable[..., Any]:
    module, name = COMMANDS[command].target.split(":")
    return getattr(importlib.import_module(module), name)


def parser(command: str) -> "ArgumentParser":
    """Return the parser of a command: `--config FILE`, and its function's arguments."""
    from jsonargparse import ArgumentParser

    chosen, function = COMMANDS[command], _function(command)
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
    """Return the file of this name, else the one that comes along, and say that it was taken."""
    given = Path(name).expanduser()
    if given.is_file():
        return str(given)
    ours = {path.name: path for path in sorted(CONFIGS.glob("*.yaml"))}
    if given.name in ours and str(given.parent) in {".", "recipes/configs"}:
        print(f"config: {ours[given.name]}, which comes along", file=sys.stderr)
        return str(ours[given.name])
    near = difflib.get_close_matches(given.name, ours, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise ValueError(f"no config file {name}: {hint}Those that come along: {', '.join(ours)}")


def _settings(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the options that are given, nested ones with dots, and where: a file, or ''."""
    import yaml

    for word, after in zip(words, [*words[1:], ""], strict=False):
        name, equals, value = word.partition("=")
        if not re.match(r"--\w", word):
            continue
        yield name[2:].rstrip("+"), ""
        if name != "--config":
            continue
        file = value if equals else after
        try:
            content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{file} is no YAML file: {' '.join(str(error).split())}") from None
        except RecursionError:
            raise ValueError(f"{file} is nested too deeply: write a key a line") from None
        if not isinstance(content, dict):
            raise ValueError(f"{file} holds no settings: write a line `key: value` for each")
        yield from ((key, file) for key in _keys(content))


def _keys(content: Mapping[Any, Any], head: str = "") -> Iterator[str]:
    """Yield the keys of a mapping, those inside of it with dots."""
    for key, value in content.items():
        yield f"{head}{key}"
        if isinstance(value, dict):
            yield from _keys(value, f"{head}{key}.")


def _variant(command: str, given: Sequence[tuple[str, str]]) -> str:
    """Return `eval --lora` for an `eval` that names adapters, by an option or in its YAML."""
    longer = f"{command} --lora"
    named = any(name.split(".")[0] == "lora" for name, _ in given)
    return longer if named and longer in COMMANDS else command


def _refuse_unknown(command: str, given: Sequence[tuple[str, str]], known: Sequence[str]) -> None:
    """Raise a ValueError for the options that there are not, with the nearest names.

    What is inside of a known one is its own matter.
    """
    hints = []
    for name, file in given:
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
            hint = str(unknown("option", name, known))
        hints.append(f"{file}: {hint}" if file else hint)
    if hints:
        raise ValueError("; ".join(dict.fromkeys(hints)))


# ------------------------------------------------------------------ help


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = ["usage: steer COMMAND [--help] [options]"]
    for group in GROUPS:
        lines += ["", f"{group}:"]
        lines += [
            f"  {name:<{width}}  {c.line}" for name, c in COMMANDS.items() if c.group == group
        ]
    return "\n".join([*lines, "", "steer COMMAND --help: its options, and two examples"])


def _help(command: str, made: "ArgumentParser") -> str:
    examples = "".join(f"\n  steer {example}" for example in COMMANDS[command].examples)
    return f"{made.format_help()}\nexamples:{examples}"


# ------------------------------------------------------------------ the program


def _run(command: str, rest: Sequence[str]) -> None:
    if command == "--version":
        import steer

        say(f"flowsteer {steer.__version__}")
        return
    if command not in COMMANDS:
        raise unknown("command", command, COMMANDS)
    words = _flags(rest)
    given = list(_settings(words))
    command = _variant(command, given)
    made = parser(command)
    if any(word in {"-h", "--help"} for word in words):
        say(_help(command, made))
        return
    _refuse_unknown(command, given, list(made.get_defaults().keys()))
    from jsonargparse import ArgumentError

    try:
        options = made.parse_args(words)
        options.pop("config", None)
        settings = made.instantiate(options).as_dict()
    except (ArgumentError, TypeError) as error:
        raise ValueError(" ".join(str(error).split())) from error
    except RecursionError:
        raise ValueError("a value is nested too deeply: write it with fewer brackets") from None
    _function(command)(**settings)


def main(args: Sequence[str] | None = None) -> int:
    """Run a command; errors of use are one line on stderr and exit code 2."""
    argv = list(sys.argv[1:] if args is None else args)
    try:
        if not argv or argv[0] in {"-h", "--help"}:
            say(_usage())
            return 0 if argv else 2
        _run(argv[0], argv[1:])
    except KeyboardInterrupt:
        print("\ninterrupted: run the same command again to go on", file=sys.stderr)
        return 130
    except SystemExit as stop:
        where = place(stop)
        if where is None:
            raise
        return _fail(f"a file of yours ended the program ({where})")
    except (UnheardError, BrokenPipeError) as error:
        _deaf()
        print(
            f"error: standard output was closed or is full ({reason(error)}): what the command "
            "wrote to files is whole, what it had to say is lost",
            file=sys.stderr,
        )
        return 141
    except Exception as error:
        message = explained(error)
        if message is None:
            raise
        return _fail(message)
    return 0


def _fail(message: str) -> int:
    if os.environ.get("STEER_TRACEBACK"):
        raise
    print(f"error: {message}", file=sys.stderr)
    return 2


def _deaf() -> None:
    """Send what is still to be written nowhere: Python would complain of it at its end."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, AttributeError):
        return


if __name__ == "__main__":
    sys.exit(main())
