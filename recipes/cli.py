"""The command line: `steer COMMAND`. Each command is a typed function, see recipes/commands.py."""

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

from recipes.arguments import function_of, further_help, parse, parser
from recipes.commands import COMMANDS, GROUPS
from recipes.faults import explained, place
from recipes.terminal import UnheardError, say
from steer.names import reason

__all__ = ["main"]


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = ["usage: steer COMMAND [--help] [options]"]
    for group in GROUPS:
        lines += ["", f"{group}:"]
        lines += [
            f"  {name:<{width}}  {c.line}" for name, c in COMMANDS.items() if c.group == group
        ]
    return "\n".join(
        [*lines, "", "steer COMMAND --help lists the options of a command and shows two examples"]
    )


def _help(command: str) -> str:
    examples = "".join(f"\n  steer {example}" for example in COMMANDS[command].examples)
    return f"{parser(command).format_help()}{further_help(command)}\nexamples:{examples}"


def _run(command: str, rest: Sequence[str]) -> None:
    if command == "--version":
        import steer

        say(f"flowsteer {steer.__version__}")
        return
    command, settings = parse(command, rest)
    if settings is None:
        say(_help(command))
    else:
        function_of(command)(**{name: _at_home(value) for name, value in settings.items()})


def _at_home(value: Any) -> Any:
    """Return an option's value with `~` expanded in its paths."""
    if isinstance(value, Path):
        from steer.files import expanded  # which loads torch

        return expanded(value)
    if isinstance(value, list):
        return [_at_home(one) for one in value]
    if isinstance(value, dict):
        return {name: _at_home(one) for name, one in value.items()}
    return value


def _after(command: str) -> str:
    """Return what a user can do after a command was stopped."""
    if command in ("studio", "serve-reward"):
        return "nothing is served any more; files that were saved are kept"
    return "run the same command again to resume; finished parts are kept"


def main(args: Sequence[str] | None = None) -> int:
    """Run a command; errors of use are one line on stderr and exit code 2."""
    argv = list(sys.argv[1:] if args is None else args)
    try:
        if not argv or argv[0] in {"-h", "--help"}:
            say(_usage())
            return 0 if argv else 2
        with nullcontext() if argv[0] == "serve-reward" else _terminable():
            _run(argv[0], argv[1:])
    except _Terminated:
        print(f"\nterminated: {_after(argv[0])}", file=sys.stderr)
        return 128 + signal.SIGTERM
    except KeyboardInterrupt as stop:
        text = str(stop) or _after(argv[0])
        print(f"\ninterrupted: {text}", file=sys.stderr)
        return 130
    except SystemExit as stop:
        where = place(stop)
        if where is None:
            raise
        return _fail(f"your file ended the program ({where})")
    except (UnheardError, BrokenPipeError) as error:
        _deaf()
        print(
            f"error: standard output was closed or is full ({reason(error)}): files are written "
            "completely, but the printed output is lost",
            file=sys.stderr,
        )
        return 141
    except Exception as error:
        message = explained(error)
        if message is None:
            raise
        return _fail(message)
    return 0


class _Terminated(BaseException):
    """SIGTERM was received."""


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM end a command like Ctrl-C: it cleans up, and prints a message."""

    def end(number: int, frame: FrameType | None) -> None:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _fail(message: str) -> int:
    if os.environ.get("STEER_TRACEBACK"):
        raise
    print(f"error: {message}", file=sys.stderr)
    return 2


def _deaf() -> None:
    """Discard buffered output, about which Python would print an error at exit."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, AttributeError):
        return


if __name__ == "__main__":
    sys.exit(main())
