"""The command line: `steer COMMAND`.

Each command is a typed function, and its YAML keys are the function's arguments (jsonargparse).
"""

import errno
import importlib
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser

from steer.names import unknown

__all__ = ["COMMANDS", "main", "parser"]

COMMANDS = {
    "sample": ("recipes.sample:sample", "guided sampling into a run folder"),
    "compare": ("recipes.compare:compare", "sampling methods against each other, equal calls"),
    "eval": ("recipes.evaluate:evaluate", "a model's figures on the emoji data"),
    "eval --lora": ("recipes.tuned:evaluate_tuned", "tuned against base and guidance"),
    "train": ("recipes.train:train", "train a flow map"),
    "export": ("recipes.export:export", "adapters for peft, for diffusers, or merged; the hub"),
    "finetune": ("recipes.finetune:finetune", "tune a LoRA on a model by rewards"),
    "models": ("recipes.lists:models", "list the models that come along"),
    "rewards": ("recipes.lists:rewards_", "list the rewards that come along"),
    "check-reward": ("recipes.check:check_reward", "whether a reward keeps the contract"),
    "serve-reward": ("recipes.serve:serve_reward", "serve a reward over HTTP"),
    "methods": ("recipes.lists:methods", "list the sampling methods"),
    "objectives": ("recipes.lists:objectives", "list the tuning objectives"),
}
"""Command -> its function, and one line."""

POSITIONAL = {"check-reward", "serve-reward"}
"""Commands whose required arguments are written without their names: `steer serve-reward clip`."""

LATER = {
    "height": "other sizes than the model's own",
    "width": "other sizes than the model's own",
}
"""Options of `sample` that the models of this version cannot use -> what they are for."""


def _function(command: str) -> Callable[..., Any]:
    module, name = COMMANDS[command][0].split(":")
    return getattr(importlib.import_module(module), name)


def parser(command: str) -> ArgumentParser:
    """Return the parser of a command: `--config FILE`, and its function's arguments."""
    made = ArgumentParser(prog=f"steer {command}", exit_on_error=False, allow_abbrev=False)
    made.add_argument("--config", action="config", help="a YAML file whose keys are the options")
    made.add_function_arguments(_function(command), as_positional=command in POSITIONAL)
    return made


def _flags(words: Sequence[str]) -> list[str]:
    """Take `--prompts-file` for `--prompts_file`, and a bare `--overwrite` for true.

    `--lora` given more than once is a list.
    """
    out = []
    repeated = sum(word.partition("=")[0] == "--lora" for word in words) > 1
    for word, after in zip(words, [*words[1:], "--"], strict=False):
        name, equals, value = word.partition("=")
        if word.startswith("--"):
            word = "--" + name[2:].replace("-", "_") + equals + value
        if repeated and re.match(r"--lora(=|$)", word):
            word = "--lora+" + word[len("--lora") :]
        bare = after.startswith("--") or (word == "--json" and after not in {"true", "false"})
        if bare and word in {"--check", "--json", "--overwrite", "--private"}:
            word += "=true"
        out.append(word)
    return out


def _variant(command: str, words: Sequence[str]) -> str:
    """Return `eval --lora` for an `eval` that names adapters, by an option or in its YAML."""
    for word, after in zip(words, [*words[1:], ""], strict=False):
        name, _, value = word.partition("=")
        file = Path(value or after)
        named = name.split(".")[0].rstrip("+") == "--lora"
        if name == "--config" and file.is_file():
            named = bool(re.search(r"^lora:", file.read_text(encoding="utf-8"), re.MULTILINE))
        if named and f"{command} --lora" in COMMANDS:
            return f"{command} --lora"
    return command


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {line}" for name, (_, line) in COMMANDS.items()]
    return "\n".join(["usage: steer COMMAND [--help] [options]", "", *lines])


def _explain(error: Exception, command: str, made: ArgumentParser) -> str:
    """Say what is wrong with the arguments, with the nearest names for what is not known."""
    text = str(error)
    found = re.findall(r"--([\w-]+)", text) if "nrecognized" in text else []
    found += re.findall(r"[Kk]ey ['\"]([\w.-]+)['\"]", text)
    found += re.findall(r"nested key ['\"]([\w.-]+)['\"]", text)
    known = [a.dest for a in made._actions if a.dest.partition("_")[0] not in {"help", "print"}]
    hints = []
    for name in dict.fromkeys(found):
        dashed = name.replace("_", "-")
        if command == "sample" and dashed in LATER:
            hints.append(
                f"option {dashed!r} is for {LATER[dashed]}, which this version's models cannot "
                "use: leave it out"
            )
        elif name.replace("-", "_") not in known:
            hints.append(str(unknown("option", name.replace("-", "_"), known)))
    return "; ".join(hints) or text


def _os_error(error: OSError) -> str:
    if error.errno in {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}:
        return (
            f"the disk is full ({error.strerror}: {error.filename or 'while writing'}): nothing "
            "half-written is left; make room and run the same command again, finished prompts are "
            "kept"
        )
    if error.errno is None:
        return str(error)
    return f"{error.strerror}: {error.filename}" if error.filename else str(error)


def main(args: Sequence[str] | None = None) -> int:
    """Run a command; errors of use are one line on stderr and exit code 2."""
    argv = list(sys.argv[1:] if args is None else args)
    if not argv or argv[0] in {"-h", "--help"}:
        print(_usage())
        return 0 if argv else 2
    command, rest = argv[0], argv[1:]
    try:
        if command == "--version":
            import steer

            print(f"flowsteer {steer.__version__}")
            return 0
        if command not in COMMANDS:
            raise unknown("command", command, COMMANDS)
        command = _variant(command, rest)
        made = parser(command)
        try:
            options = made.parse_args(_flags(rest))
        except (ArgumentError, TypeError) as error:
            raise ValueError(_explain(error, command, made)) from error
        options.pop("config", None)
        _function(command)(**made.instantiate(options).as_dict())
    except KeyboardInterrupt:
        print("\ninterrupted: run the same command again to go on", file=sys.stderr)
        return 130
    except OSError as error:
        return _fail(_os_error(error))
    except (ValueError, FloatingPointError, TypeError, ImportError) as error:
        return _fail(str(error))
    return 0


def _fail(message: str) -> int:
    if os.environ.get("STEER_TRACEBACK"):
        raise
    print(f"error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
